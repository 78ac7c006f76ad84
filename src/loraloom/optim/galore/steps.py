"""One weight's part of a GaLore step: a new basis for its gradient, and how its compact step moves it."""

from typing import cast

import torch
from torch import Tensor

from loraloom.optim.galore.bases import Bases, limit_growth, norm_ratio, project_back, subspace_bases, svd_bases
from loraloom.optim.galore.compact import Projected, laid_out_like, whole


def renewed_bases(refresh: str, G: Tensor, slot: Projected, old: Bases, seed: int, step: int) -> Bases:
    """New bases for a gradient G (m, n), which is finite and not zero.

    Args:
        refresh: "svd" or "subspace".
        G: whole, also where the weight is sharded.
        slot: the weight.
        old: the bases so far; None where there is none.
        seed, step: what "subspace" draws depends on them and on the weight, and on nothing else.
    """
    if refresh == "svd":
        return svd_bases(G, slot.rank, slot.sides)
    generator = torch.Generator().manual_seed(seed + slot.index + (step << 32))
    return subspace_bases(G, slot.rank, slot.sides, old, generator)


def finite(slots: list[Projected]) -> list[Projected]:
    """Those with a finite compact gradient; the others lose it. Waits for the device once."""
    if not slots:
        return slots
    norms = [whole(torch.linalg.vector_norm(cast(Tensor, slot.compact.grad), float("inf"))) for slot in slots]
    good = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().tolist()
    for slot, is_good in zip(slots, good, strict=True):
        if not is_good:
            slot.compact.grad = None
    return [slot for slot, is_good in zip(slots, good, strict=True) if is_good]


def add_projected_step_(slot: Projected, bases: Bases, scale: float) -> None:
    """W += scale * back(N), with N the compact parameter after the inner optimizer's step from zero."""
    slot.weight.add_(laid_out_like(project_back(slot.compact, bases), slot.weight), alpha=scale)


def add_scaled_gradient_(
    slot: Projected, bases: Bases | None, lr: float, scale: float, previous: Tensor | None
) -> Tensor:
    """W -= scale * lr * limit(phi * S), with phi how much the inner optimizer scaled the compact gradient.

    Args:
        slot: the weight; its gradient and its compact gradient are still there.
        bases: given for Fira, where S is the gradient outside them, G - back(R); None for APOLLO, where S is G.
        lr: the learning rate that the compact step includes, not zero.
        scale: multiplies the step.
        previous: the norm of the last step, for `limit_growth`; None at the first.

    Returns:
        The norm of this one.
    """
    N, R, G = slot.compact, cast(Tensor, slot.compact.grad), cast(Tensor, slot.weight.grad)
    S = G.to(N.dtype)
    if bases is not None:
        S = S - project_back(R, bases)
    S = S * (norm_ratio(N, R, slot.sides, whole=bases is None and slot.rank == 1) / lr)
    S, norm = limit_growth(S, previous)
    slot.weight.add_(S, alpha=-lr * scale)
    return norm
