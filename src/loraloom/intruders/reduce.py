"""Scaling the intruders of one matrix down (arXiv 2410.21228, section 6), and going back to factors.

    W' -> W' + (lambda - 1) sum_j s_j u_j v_j^T,    j over the intruders

lambda = 1 changes nothing, 0 removes them. The difference to W' has as many dimensions as intruders are scaled, so that
rank r + that many holds the result exactly.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loraloom.intruders.find import LayerIntruders
from loraloom.intruders.solvers.matrix import Weight, row_norms
from loraloom.update.lowrank import truncate

Scope = Literal["top", "all"]
Rank = Literal["exact", "keep"] | int


class Mitigated(NamedTuple):
    """Factors of a mitigated update."""

    A: Tensor
    """(k, in)"""
    B: Tensor
    """(out, k)"""
    error: float
    """What limiting the rank lost, relative to the mitigated B A, in the Frobenius norm; 0 at rank "exact"."""
    magnitude: Tensor | None
    """DoRA's m (out,) for these factors, or None."""


def check_options(scale: float, scope: Scope, rank: Rank) -> None:
    """Raises ValueError for a mitigation that is not defined."""
    if not scale >= 0:
        raise ValueError(f"scale={scale!r} must not be negative: 1 changes nothing, 0 removes the intruders.")
    if scope not in ("top", "all"):
        raise ValueError(f"scope={scope!r} is not known: expected 'top' (the first intruder) or 'all'.")
    if rank not in ("exact", "keep") and not (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
        raise ValueError(f"rank={rank!r} is not known: expected 'exact', 'keep' or a positive integer.")


def correction(found: LayerIntruders, scale: float, scope: Scope) -> tuple[Tensor, Tensor]:
    """What mitigation adds to B A, as float32 factors (q, in) and (out, q): q is 0 where nothing changes."""
    q = 0 if scale == 1 else len(found.intruders[:1] if scope == "top" else found.intruders)
    U, S, Vh = found.vectors.U[:, :q], found.vectors.S[:q], found.vectors.Vh[:q]
    root = (S * abs(scale - 1)).sqrt()
    extra_B = U * (root if scale > 1 else -root)
    if found.row_scale is not None:
        # Inside of DoRA's rescaling. Where that is zero the row of W' is, and so is that of U.
        c = found.row_scale[:, None]
        extra_B = torch.where(c == 0, 0.0, extra_B / c)
    return root[:, None] * Vh, extra_B


def reduced(
    A: Tensor, B: Tensor, extra_A: Tensor, extra_B: Tensor, rank: Rank, limit: int
) -> tuple[Tensor, Tensor, float]:
    """Factors of ``B A + extra_B extra_A`` with the wanted rank, and the relative error of that.

    "exact" appends the extra rows and columns; "keep" truncates to the rank of A, if there are any; a number truncates
    to it. No more than ``limit`` rows, the rank that any matrix of that shape can have, unless A itself has more.
    """
    q = len(extra_A)
    wanted = len(A) + q if rank == "exact" else len(A) if rank == "keep" else rank
    if q:
        A, B = torch.cat([A, extra_A.to(A)]), torch.cat([B, extra_B.to(B)], dim=1)
        wanted = min(wanted, max(limit, len(A) - q))
    return truncate(A, B, wanted) if wanted < len(A) else (A, B, 0.0)


@torch.no_grad()
def mitigate_matrix(
    W: Weight,
    A: Tensor,
    B: Tensor,
    found: LayerIntruders,
    *,
    scale: float = 0.75,
    scope: Scope = "top",
    rank: Rank = "exact",
    magnitude: Tensor | None = None,
) -> Mitigated:
    """Scales the intruders of ``W + B A`` down, and gives the result as new factors for the same W.

    For DoRA the rescaling of each row, c, stays as it is: the new magnitude is ``c rownorm(W + B' A')``, so that the
    adapted weight at rank "exact" is the mitigated one.

    Args:
        W, A, B, magnitude: as they were given to :func:`analyse_matrix`. Read only.
        found: its result.
        scale: what is left of each intruder, at least 0; 1 changes nothing, 0.7 to 0.9 is the paper's safe band.
        scope: "top", the paper's: the first intruder only; "all": each of them.
        rank: "exact": A' has one row more per intruder scaled. "keep": as many rows as A, with the error reported.
            A number: no more than that.

    Returns:
        A', B' scaled by 1 like A and B, the error, and DoRA's new magnitude.

    Raises:
        ValueError: an option is out of range.
    """
    check_options(scale, scope, rank)
    new_A, new_B, error = reduced(A, B, *correction(found, scale, scope), rank, min(found.shape))
    if magnitude is not None and found.row_scale is not None and (new_A is not A or new_B is not B):
        magnitude = found.row_scale * row_norms(W, new_A, new_B)
    return Mitigated(new_A, new_B, error, magnitude)
