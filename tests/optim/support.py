"""A stand-in for an adapted model: gated low-rank layers under the adapter's parameter names, and nothing else."""

import torch
from torch import Tensor, nn


class Vector(nn.Module):
    def __init__(self, n: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, dtype=dtype))


class GatedLinear(nn.Module):
    """W x + g B A x with W frozen and B = 0 at the start."""

    def __init__(self, width: int, r: int = 2) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, width).requires_grad_(False)
        self.loom_lora_A = nn.ModuleDict({"default": nn.Linear(width, r, bias=False)})
        self.loom_lora_B = nn.ModuleDict({"default": nn.Linear(r, width, bias=False)})
        self.loom_gate_lora_magnitude_vector = nn.ModuleDict({"default": Vector()})
        nn.init.zeros_(self.loom_lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        delta = self.loom_lora_B["default"](self.loom_lora_A["default"](x))
        return self.base_layer(x) + self.loom_gate_lora_magnitude_vector["default"].weight * delta


class GatedModel(nn.Module):
    """``depth`` gated layers with tanh between them, and a trained head."""

    def __init__(self, depth: int = 4, width: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedLinear(width) for _ in range(depth))
        self.head = nn.ModuleDict({"modules_to_save": nn.ModuleDict({"default": nn.Linear(width, 3)})})
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head["modules_to_save"]["default"](x)

    @property
    def gates(self) -> list[nn.Parameter]:
        return [layer.loom_gate_lora_magnitude_vector["default"].weight for layer in self.layers]


def gated_model(seed: int = 0, **kwargs) -> GatedModel:
    torch.manual_seed(seed)
    return GatedModel(**kwargs)


def batch(step: int, width: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, width, generator=generator, dtype=dtype)
    return x, torch.randn(8, 3, generator=generator, dtype=dtype)


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype=dtype)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different}"
