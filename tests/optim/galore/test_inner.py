"""Any torch optimizer as the inner one: those that read the weight are recognized, and get the projected weight."""

from collections.abc import Callable, Iterable
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import Tensor, nn

from loraloom.optim import APOLLO, Fira, GaLore

from .support import chain, matrices_and_vectors, train

# Class, its options, and whether its step depends on the weight.
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}, False),
    "NAdam": (torch.optim.NAdam, {}, False),
    "RAdam": (torch.optim.RAdam, {}, False),
    "Adamax": (torch.optim.Adamax, {}, False),
    "Adagrad": (torch.optim.Adagrad, {}, False),
    "Adadelta": (torch.optim.Adadelta, {}, False),
    "RMSprop": (torch.optim.RMSprop, {}, False),
    "Rprop": (torch.optim.Rprop, {}, False),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, False),
    "Adafactor": (torch.optim.Adafactor, {}, True),
    "Adafactor, absolute": (torch.optim.Adafactor, {"eps": (None, 1.0)}, False),
    "transformers' Adafactor": (transformers.Adafactor, {"relative_step": False}, True),
    "transformers' Adafactor, absolute": (
        transformers.Adafactor,
        {"relative_step": False, "scale_parameter": False},
        False,
    ),
    "LAMB": (bitsandbytes.optim.LAMB, {}, True),
    "Lion": (bitsandbytes.optim.Lion, {}, False),
    "AdamW8bit": (bitsandbytes.optim.AdamW8bit, {}, False),
    "AdEMAMix": (bitsandbytes.optim.AdEMAMix, {}, False),
}


def moved(build: Callable[[Iterable[Any]], torch.optim.Optimizer]) -> tuple[float, torch.optim.Optimizer]:
    """How far five steps take the square weight, as a share of its norm."""
    model = chain()
    before = model.square.weight.detach().clone()
    optimizer = build(matrices_and_vectors(model))
    train(model, optimizer, 5)
    return float((model.square.weight.detach() - before).norm() / before.norm()), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_moves_the_weights_about_as_far_as_alone(name: str) -> None:
    """Not further, because a projection shortens; and no less than rank 4 of 14 leaves of an even gradient."""
    kind, options, reads = OPTIMIZERS[name]
    alone, _ = moved(lambda groups: kind(groups, lr=1e-2, **options))
    inside, optimizer = moved(lambda groups: GaLore(groups, kind, 1e-2, rank=4, scale=1.0, **options))
    assert optimizer._reads_weights == reads
    assert (4 / 14) * alone < inside < 1.01 * alone


class TrustRatio(torch.optim.Optimizer):
    """W <- W - lr ||W|| / ||G|| G: reads the weight, and does not see in which coordinates it is given."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * float(p.norm() / p.grad.norm().clamp(min=1e-30)))


@pytest.mark.parametrize("kind", [GaLore, Fira, APOLLO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_basis_holds_weight_and_gradient_it_is_the_inner_optimizer(kind: type, dtype: torch.dtype) -> None:
    """Weights and inputs of a 3-dimensional subspace, and bases that hold it: then W P has the norm of W.

    APOLLO's random basis holds nothing; its step has the direction of G and the length of the compact step, which
    norms in expectation only: it is checked to be a positive multiple of the step alone.
    """
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3, dtype=dtype)).Q.T
    inputs = torch.randn(9, 3, dtype=dtype) @ basis
    start = torch.randn(16, 3, dtype=dtype) @ basis
    weights: list[Tensor] = []
    for build in (lambda p: kind(p, TrustRatio, 1e-2, rank=4, scale=1.0), lambda p: TrustRatio(p, 1e-2)):
        W = nn.Parameter(start.clone())
        optimizer = build([W])
        for _ in range(1 if kind is APOLLO else 10):
            optimizer.zero_grad()
            (inputs @ W.T).square().sum().backward()
            optimizer.step()
        weights.append(W.detach())
    ours, alone = weights[0] - start, weights[1] - start
    if kind is APOLLO:
        # Rows are scaled one by one: each has the direction of the gradient's.
        torch.testing.assert_close(
            nn.functional.cosine_similarity(ours, alone), torch.ones(16, dtype=dtype), rtol=0, atol=1e-5
        )
    else:
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-6)
