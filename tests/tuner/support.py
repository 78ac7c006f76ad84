"""Toy models of every layer kind, and the adapter's formula written out densely in float64 as the reference.

Nothing here calls the package: the reference reads base weights and adapter parameters by their public names only.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from loraloom import LoomConfig

R, ALPHA = 4, 6
PARTS = [
    {"use_mixer": mixer, "use_gate": gate, "use_dora": dora, "use_rslora": rslora}
    for mixer, gate, dora, rslora in itertools.product(("orthogonal", False), *3 * ((True, False),))
]
ALL_PARTS = PARTS[0]
PART_NAMES = ("mixer", "gate", "dora", "rslora")
PART_IDS = ["+".join(n for n in PART_NAMES if parts[f"use_{n}"]) or "lora" for parts in PARTS]
KINDS = ("linear", "conv1d", "embedding", "conv2d", "nf4")
FLOAT_KINDS = KINDS[:4]
# What a different order of additions may cost, relative to the largest entry.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
ADAPTER_PART = {
    "A": "loom_lora_A",
    "B": "loom_lora_B",
    "M": "loom_mixer",
    "g": "loom_gate_lora_magnitude_vector",
    "m": "loom_lora_magnitude_vector",
}


class Toy(nn.Module):
    """One layer, named `target`, as the whole model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.target = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.target(x)


class Pair(nn.Module):
    """Two linears and a nonlinearity: the smallest model in which gradients have somewhere to flow."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def nf4_linear(inputs: int, outputs: int, dtype: torch.dtype, *, nested: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    source = nn.Linear(inputs, outputs)
    layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")  # quantises


def int8_linear(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    source = nn.Linear(inputs, outputs)
    layer = bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")


def quantised_base(kind, dtype=torch.float32):
    """32 outputs and 64 inputs: the least that bitsandbytes repacks."""
    layer = int8_linear(64, 32) if kind == "int8" else nf4_linear(64, 32, dtype, nested=kind == "nested nf4")
    base = Toy(layer)
    setattr(base, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return base


def nf4_llama(directory, nested=False):
    """A language model in 4 bits."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, device_map="cpu")


def make_base(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    """A toy model with weights that depend on the seed only, in eval mode."""
    torch.manual_seed(seed)
    if kind == "nf4":
        base = Toy(nf4_linear(64, 16, dtype, seed=seed))
        base.is_loaded_in_4bit = True
        return base.eval()
    if kind == "conv1d":
        layer: nn.Module = Conv1D(10, 6)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    else:
        layer = {
            "linear": lambda: nn.Linear(6, 10),
            "embedding": lambda: nn.Embedding(7, 10),
            "conv2d": lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2),
        }[kind]()
    return Toy(layer).to(dtype).eval()


def make_input(kind: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(0, 7, (2, 5), generator=generator)
    shape = {"conv2d": (2, 3, 6, 6), "nf4": (2, 5, 64)}.get(kind, (2, 5, 6))
    return torch.randn(shape, generator=generator).to(dtype)


def with_adapter(base: nn.Module, parts: dict[str, Any] | None = None, **kwargs: Any) -> PeftModel:
    """The base with one loom adapter "default" on `target`, in eval mode."""
    values = {"r": R, "lora_alpha": ALPHA, "target_modules": ["target"]} | (parts or {}) | kwargs
    return get_peft_model(base, LoomConfig(**values)).eval()


def randomise(model: nn.Module, seed: int = 2) -> None:
    """Gives every adapter parameter a value with an effect, as an optimizer step would: in place, under no_grad."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if ".loom_gate" in name or "magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise.clamp(-2, 2))
            elif ".loom_" in name or ".lora_" in name:
                parameter.copy_(0.4 * noise)


def adapted(parts: dict[str, Any], kind: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PeftModel:
    """A toy model with one adapter whose every part differs from its start."""
    model = with_adapter(make_base(kind, dtype), parts, **kwargs)
    randomise(model)
    return model


def adapter_tensors(model: nn.Module, adapter: str = "default", module: str = "target") -> dict[str, torch.Tensor]:
    """A, B, M, g, m (those that exist) of one module in float64, by parameter name."""
    found = {}
    for name, parameter in model.named_parameters():
        for part, attribute in ADAPTER_PART.items():
            if name.endswith(f"{module}.{attribute}.{adapter}.weight"):
                found[part] = parameter.detach().double()
    return found


@dataclass(frozen=True)
class Dense:
    """A layer as (out, in) weight and bias in float64, with the function that applies them."""

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, kind: str, layer: nn.Module) -> "Dense":
        if kind == "nf4":
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = layer.weight.detach()
        weight = weight.double()
        if kind in ("conv1d", "embedding"):
            weight = weight.T
        bias = getattr(layer, "bias", None)
        return cls(kind, weight.reshape(weight.shape[0], -1).clone(), None if bias is None else bias.detach().double())

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if weight is None else weight
        if self.kind == "embedding":
            return F.embedding(x, weight.T)
        if self.kind == "conv2d":
            return F.conv2d(x.double(), weight.reshape(-1, 3, 3, 3), self.bias, padding=1, stride=2)
        return F.linear(x.double(), weight, self.bias)

    def adapted_weight(self, t: dict[str, torch.Tensor], parts: dict[str, Any]) -> torch.Tensor:
        """``m * (W + g s B M A) / rownorm(W + g s B M A)``, or without m and the norm."""
        A, B = t["A"].reshape(t["A"].shape[0], -1), t["B"].reshape(t["B"].shape[0], -1)
        rank = A.shape[0]
        scale = ALPHA / (rank**0.5 if parts["use_rslora"] else rank)
        weight = self.weight + t.get("g", torch.ones(1).double()) * scale * (
            B @ t.get("M", torch.eye(rank).double()) @ A
        )
        if "m" not in t:
            return weight
        return t["m"].reshape(-1, 1) * weight / weight.norm(dim=1, keepdim=True)


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None, factor: float = 1
) -> None:
    """Equal up to rounding in `dtype` (default: that of `actual`), relative to the largest expected entry."""
    tolerance = factor * TOLERANCE[dtype or actual.dtype] * expected.abs().max().clamp_min(1e-30).item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def peft_names(name: str) -> str:
    """PEFT's LoRA parameter name -> ours."""
    return (
        name.replace(".lora_embedding_A.default", ".loom_lora_A.default.weight")
        .replace(".lora_embedding_B.default", ".loom_lora_B.default.weight")
        .replace(".lora_", ".loom_lora_")
    )


def pair_with_peft(base_of: Any, config: LoraConfig, seed: int = 3, **kwargs: Any) -> tuple[PeftModel, PeftModel]:
    """(PEFT's model, ours by `from_lora`) on equal bases with equal, non-trivial adapter weights."""
    theirs = get_peft_model(base_of(), config)
    ours = get_peft_model(base_of(), LoomConfig.from_lora(config, **kwargs))
    randomise(theirs, seed)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                target = own[peft_names(name)]
                target.copy_(parameter.reshape(target.shape))
    return theirs, ours
