"""A small network with every kind of layer, PEFT LoRAs of it on disk, and the sum of their updates by PEFT itself."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """Token ids (batch, 8) -> (batch, 5): an embedding, a convolution, three linears and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.layers = nn.ModuleList([nn.Linear(18, 18) for _ in range(2)])
        self.plain = nn.Linear(18, 7, bias=False)
        self.mix = Conv1D(5, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids)[:, None]).transpose(1, 2).flatten(2)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.mix(torch.tanh(self.plain(x))).mean(1)


LOGITS = "loom_logits_lora_magnitude_vector"  # a part of the name keeps TRL from casting them to bf16
LINEARS = ["layers.0", "layers.1", "plain"]
# Name -> what differs from one member to the next; "lora_bias" where PEFT allows it.
MEMBERS = {
    "squad": {"r": 3, "lora_alpha": 5, "target_modules": [*LINEARS, "embed"]},
    "fever": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["layers.0", "conv"], "lora_bias": True},
    "nli": {
        "r": 4,
        "rank_pattern": {"layers.1": 1},
        "alpha_pattern": {"layers.1": 7, "plain": 2},
        "target_modules": ["layers.1", "plain", "conv"],
    },
}
PAPER = {"constraint": "softmax", "total": 1}  # WLoRA's own, whose formula is the simplest reference
WEIGHTS = {"squad": 0.7, "fever": -0.4, "nli": 1.5}


def base() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.normal_(net.mix.weight)
    return net


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(seed))


def lora(name: str, **changes: object) -> PeftModel:
    """One of MEMBERS on a new base, by PEFT, with weights that depend on its name only."""
    torch.manual_seed(sum(map(ord, name)))
    model = get_peft_model(base(), LoraConfig(**{**MEMBERS[name], "init_lora_weights": False, **changes}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
    return model.eval()


def save_members(folder: Path) -> dict[str, Path]:
    """All of MEMBERS, each in a folder of its own."""
    for name in MEMBERS:
        with warnings.catch_warnings():  # PEFT 0.21 takes the bias of a lora_B for a broken lora_B
            warnings.filterwarnings("ignore", message=".*invalid shape.*lora_B.bias")
            lora(name).save_pretrained(folder / name)
    return {name: folder / name for name in MEMBERS}


def summed(weights: dict[str, float] | dict[str, dict[str, float]]) -> Net:
    """The base with ``sum_n w_n delta_n`` merged in, deltas by PEFT; weights per member, or module -> per member."""
    result = base()
    with torch.no_grad():
        for name in MEMBERS:
            merged = lora(name).merge_and_unload()
            original = base()
            for (key, parameter), new, old in zip(
                result.named_parameters(), merged.parameters(), original.parameters(), strict=True
            ):
                w = weights.get(key.rpartition(".")[0], weights)
                if name in w:
                    parameter.add_(w[name] * (new - old))
    return result


def set_logits(model: nn.Module, seed: int = 5) -> None:
    """Weights of the members that differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if LOGITS in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
