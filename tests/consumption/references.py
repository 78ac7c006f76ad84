"""Pico base models, and what each adapter makes of them in float64. Nothing here calls the package.

The adapted weights of PEFT's adapters come from PEFT's own layers in a float64 model: a linear layer that is given the
identity matrix answers with W'^T + b'. Those of ours are written out from the saved tensors.
"""

import copy
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.models import gpt2, llama, mixtral

IDS = torch.arange(20).reshape(2, 10)  # the whole vocabulary
TOP_K, EPSILON, SCALE = 3, 0.7, 0.25  # of the search for intruders, and what is left of each
PREFIX = "base_model.model."
_SIZES: dict[str, Any] = {"vocab_size": 20, "initializer_range": 0.2}
BASES = {
    "llama": lambda: llama(16, attention_bias=True, tie_word_embeddings=False, **_SIZES),
    "tied": lambda: llama(16, tie_word_embeddings=True, **_SIZES),
    "moe": lambda: mixtral(16, **_SIZES),
    "gpt2": lambda: gpt2(n_positions=16, n_layer=2, **_SIZES),
}
BASES["pruned"] = BASES["llama"]


def make_base(name: str, folder: Path) -> None:
    """Writes a pico model with weights from a fixed seed; of "pruned" two rows of every projection are zero."""
    torch.manual_seed(0)
    model = BASES[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # transformers starts them at zero
                parameter.normal_(std=0.2)
            elif name == "pruned" and "_proj" in key:
                parameter[[3, 5]] = 0
    model.save_pretrained(folder)


@cache
def _loaded(folder: Path) -> Any:
    # The fused product of experts knows no float64.
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(_loaded(folder)).to(dtype)


def load_adapter(folder: Path, base: Path) -> PeftModel:
    """In PEFT, to compute in float64. Starts that look at the base weight are made in float32, as PEFT wants it."""
    return PeftModel.from_pretrained(load_base(base), folder).double().eval()


def logits(model: Any) -> Tensor:
    """(2, 10, 20) in float64."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.double()


@dataclass
class Weight:
    """A module's weight without the adapter, W, and with it, W', (out, in), and its bias with it, or None."""

    before: Tensor
    after: Tensor
    bias: Tensor | None

    @cached_property
    def intruders(self) -> Tensor:
        """Indices of the intruders among the first TOP_K directions of W' (arXiv 2410.21228)."""
        U0, S0, _ = torch.linalg.svd(self.before, full_matrices=False)
        U, _, _ = torch.linalg.svd(self.after, full_matrices=False)
        cosines = (U0[:, 1e-5 * S0[0] < S0].T @ U[:, :TOP_K]).abs().amax(0)
        return (cosines < EPSILON).nonzero()[:, 0]

    @property
    def mitigated(self) -> Tensor:
        """W' + (SCALE - 1) sum s u v^T over the intruders."""
        U, S, Vh = torch.linalg.svd(self.after, full_matrices=False)
        found = self.intruders
        return self.after + (SCALE - 1) * (U[:, found] * S[found]) @ Vh[found]


class Reference:
    """What a saved adapter makes of its base model, in float64.

    Args:
        base: folder of the base model.
        folder: of the adapter.
        per_weight: whether the adapter is an update of weights at all; if not there are its logits alone.
    """

    def __init__(self, base: Path, folder: Path, per_weight: bool = True) -> None:
        self.base, self.per_weight = base, per_weight
        self.config = json.loads((folder / "adapter_config.json").read_text())
        self.tensors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        self.peft_type = self.config["peft_type"]
        self.weights: dict[str, Weight] = {}
        self.peft_logits = None
        if self.peft_type == "LORA":
            model = load_adapter(folder, base)
            if per_weight:
                self.weights = _probed(model)
            found = logits(model)
            self.peft_logits = found if found.isfinite().all() else None
        elif not per_weight:
            self.peft_logits = _logits_of_twin(self, folder.with_name("twin"))
        else:
            self.weights = _written_out(load_base(base, torch.float64), self.tensors, self.config)

    @cached_property
    def logits(self) -> Tensor:
        return self._dense("after") if self.peft_logits is None else self.peft_logits

    @cached_property
    def logits_written_out(self) -> Tensor:
        """The same by writing every W' into the base model: the reference of the reference."""
        return self._dense("after")

    @cached_property
    def logits_of_updates(self) -> Tensor:
        """Without heads, biases and tokens that were trained beside the low-rank updates."""
        return self._dense("after", others=False)

    @cached_property
    def mitigated_logits(self) -> Tensor:
        return self._dense("mitigated")

    def relative_error(self, other: dict[str, Weight]) -> float:
        """``||dW - dW'|| / ||dW||`` over all modules."""
        lost = sum((w.after - other[m].after).square().sum() for m, w in self.weights.items())
        return float((lost / sum((w.after - w.before).square().sum() for w in self.weights.values())).sqrt())

    @torch.no_grad()
    def _dense(self, which: str, others: bool = True) -> Tensor:
        model = load_base(self.base, torch.float64)
        if copies := self.config.get("layer_replication"):
            layers = [copy.deepcopy(model.model.layers[i]) for start, end in copies for i in range(start, end)]
            for i, layer in enumerate(layers):
                layer.self_attn.layer_idx = i  # its place in the cache
            model.model.layers = nn.ModuleList(layers)
            model.config.num_hidden_layers = len(layers)
        if not self.config.get("ensure_weight_tying"):
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.clone())  # PEFT's adapters change one of two tied layers alone
        for key, value in self.tensors.items() if others else ():
            _write_other(model, key.removeprefix(PREFIX), value, self.config)
        for module, weight in self.weights.items():
            layer = model.get_submodule(module)
            value = getattr(weight, which)
            layer.weight.copy_(value.T if layer.weight.shape != value.shape or _is_transposed(layer) else value)
            if weight.bias is not None:
                if layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros_like(weight.bias))
                layer.bias.copy_(weight.bias)
        return logits(model)


def _logits_of_twin(reference: Reference, folder: Path) -> Tensor:
    """By PEFT, of a LoRA with the same tensors as an adapter of ours that has no parts of its own."""
    names = ("r", "lora_alpha", "target_modules", "target_parameters")
    LoraConfig(**{name: reference.config[name] for name in names}).save_pretrained(folder)
    tensors = {key.replace(".loom_lora_", ".lora_"): value.contiguous() for key, value in reference.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return logits(load_adapter(folder, reference.base))


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"


def _write_other(model: Any, key: str, value: Tensor, config: dict[str, Any]) -> None:
    if "lora_" in key or "loom_" in key:
        return
    if key.endswith(".token_adapter.trainable_tokens_delta"):
        rows = config["trainable_token_indices"]
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        model.get_submodule(key.removesuffix(".token_adapter.trainable_tokens_delta")).weight[rows] = value
        return
    model.get_parameter(key.replace(".base_layer.", ".")).copy_(value)


@torch.no_grad()
def probe(layer: Any) -> tuple[Tensor, Tensor | None]:
    """W' (out, in) and the bias (None where it is zero) of a layer, from its answers to the identity and to zero."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(base.num_embeddings)).T, None
    width = base.weight.shape[0 if _is_transposed(base) else 1]
    bias = layer(torch.zeros(1, width, dtype=torch.float64))[0]
    return layer(torch.eye(width, dtype=torch.float64)).T - bias[
        :, None
    ], bias if bias.any() and bias.isfinite().all() else None


def _probed(model: PeftModel) -> dict[str, Weight]:
    adapted = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A") and (layer.lora_A or layer.lora_embedding_A)
    }
    # PEFT's DoRA divides by the length of a row that may be zero: such a row has no direction, and stays zero.
    after = {name: (W.nan_to_num(0.0), bias) for name, layer in adapted.items() for W, bias in [probe(layer)]}
    with model.disable_adapter():
        before = {name: probe(layer)[0] for name, layer in adapted.items()}
    return {name: Weight(before[name], *after[name]) for name in adapted}


def _written_out(model: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Weight]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        module, found, part = key.removeprefix(PREFIX).removesuffix(".weight").partition(".loom_")
        if found:
            modules.setdefault(module, {})[part] = value
    return {name: _weight(name, model.get_submodule(name), parts, config) for name, parts in modules.items()}


def _weight(name: str, layer: Any, parts: dict[str, Tensor], config: dict[str, Any]) -> Weight:
    """``W' = m * norm(W + g s (B M A - B0 A0))``, or with members ``W + sum_n w_n B_n A_n``."""
    W = layer.weight.detach()
    W = W.T if _is_transposed(layer) else W
    A, B = parts["lora_A"], parts["lora_B"]
    r = len(A)
    assert r == _by_pattern(config["rank_pattern"], name, config["r"]) or config["composition"]
    scale = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"]) / (r**0.5 if config["use_rslora"] else r)
    if config["composition"]:
        bias = None
        ranks = config["composition"]["ranks"][name]
        w = _member_weights(parts["logits_lora_magnitude_vector"], ranks, config["composition"])
        W_after = W + (B * w.repeat_interleave(torch.tensor(ranks))) @ A
        if "member_bias" in parts:
            bias = w @ parts["member_bias"] + (0 if layer.bias is None else layer.bias.detach())
        return Weight(W, W_after, bias)
    product = B @ parts["mixer"] @ A if "mixer" in parts else B @ A
    if "anchor_A" in parts:
        product = product - parts["anchor_B"] @ parts["anchor_A"]
    W_after = W + parts.get("gate_lora_magnitude_vector", torch.ones(1)).double() * scale * product
    if (m := parts.get("lora_magnitude_vector")) is not None:
        length = W_after.norm(dim=1)
        W_after = torch.where(length > 0, m / length, 0.0)[:, None] * W_after
    return Weight(W, W_after, None)


def _member_weights(v: Tensor, ranks: list[int], composition: dict[str, Any]) -> Tensor:
    present, constraint, total = torch.tensor(ranks) > 0, composition["constraint"], composition["total"]
    if constraint == "scaled_softmax":
        v, total = v[:-1], v[-1]
    if constraint.endswith("softmax"):
        e = torch.where(present, v.exp(), 0.0)
        return total * e / e.sum()
    if constraint == "free":
        return v
    # The nearest point of the simplex lowers all entries by the same t and cuts at 0; t by bisection.
    low, high = v.min() - 1, v.max()
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if (v[present] - t).clamp_min(0).sum() > 1 else (low, t)
    return torch.where(present, total * (v - t).clamp_min(0), 0.0)


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The tables here have name endings as keys only."""
    return next((value for key, value in pattern.items() if f".{name}".endswith(f".{key}")), default)


def served(folder: Path, base: Path) -> Tensor:
    """Logits by a server that knows nothing but ``W + lora_alpha / r B A``, of linear layers and tables."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        assert not config.get(key), f"{key} in an adapter for servers"
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    model = load_base(base, torch.float64)
    while tensors:
        key, A = next((k, v) for k, v in tensors.items() if k.endswith((".lora_A.weight", ".lora_embedding_A")))
        B = tensors.pop(key.replace("_A", "_B"))
        del tensors[key]
        assert len(A) == config["r"]
        table = key.endswith(".lora_embedding_A")
        layer = model.get_submodule(key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")[0])
        assert isinstance(layer, nn.Embedding) == table
        delta = config["lora_alpha"] / config["r"] * B @ A
        with torch.no_grad():
            layer.weight.add_(delta.T if table or _is_transposed(layer) else delta)
    return logits(model)


def loaded_weights(folder: Path, base: Path) -> dict[str, Weight]:
    """The weights that an adapter in PEFT's format gives in PEFT."""
    return _probed(load_adapter(folder, base))
