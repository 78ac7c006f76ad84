"""A small model whose weights are a tall, a wide and a square matrix, and what trains it."""

import torch
from torch import Tensor, nn


class Chain(nn.Module):
    """Three linear layers, one of each shape that a side is chosen by, and norms and biases between them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tall, self.wide, self.square = nn.Linear(16, 20), nn.Linear(20, 12), nn.Linear(14, 14, bias=False)
        self.norm = nn.LayerNorm(14)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.tall(x))
        hidden = torch.tanh(self.wide(hidden))
        return self.norm(self.square(torch.cat([hidden, hidden[..., :2]], -1)))


def chain(dtype: torch.dtype = torch.float32) -> Chain:
    torch.manual_seed(0)
    return Chain(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator).to(dtype)
    y = torch.randn(8, 14, generator=generator).to(dtype)
    return (model(x[rows]) - y[rows]).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range | int, dtype=torch.float32) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        optimizer.step()


def matrices_and_vectors(model: nn.Module, **options) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], **options},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
