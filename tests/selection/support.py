"""A small network of every layer type, gated adapters on it, and a training loop."""

from collections.abc import Iterable

import peft
import torch
from torch import Tensor, nn

from loraloom import LoomConfig
from loraloom.optim import WeightAdam, build_optimizer
from loraloom.selection import AdapterSelection

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def adapted(seed: int = 0, depth: int = 3, **options) -> peft.PeftModel:
    """Gated adapters of rank 2 on the blocks' linear layers, or on ``target_modules``."""
    torch.manual_seed(seed)
    defaults = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "down"], "modules_to_save": ["head"]}
    return peft.get_peft_model(Net(depth), LoomConfig.weightlora(**defaults | options))


def optimizer_for(model: nn.Module, **options) -> WeightAdam:
    return build_optimizer(model, "weight_adam", **{"lr": 1e-2, "gate_lr": 0.3, "weight_decay": 0.1} | options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 11, (4, 5), generator=generator), torch.randn(4, 5, 3, generator=generator)


def train(model: nn.Module, optimizer: WeightAdam, steps: Iterable[int]) -> None:
    for step in steps:
        ids, y = batch(step)
        optimizer.zero_grad()
        (model(ids) - y).square().mean().backward()
        optimizer.step()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(99)[0])


def run(keep, steps: int, model_options: dict | None = None, **options) -> AdapterSelection:
    model = adapted(**model_options or {})
    selection = AdapterSelection(model, optimizer_for(model), keep, **options)
    train(model, selection.optimizer, range(steps))
    return selection


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Every trained tensor away from its start, and the gates of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=1.5 if "gate" in name else 0.15)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different}"
