"""Intruder dimensions of one matrix: what they are, and finding them (arXiv 2410.21228).

With W = U0 diag(s0) V0^T the base weight and W' = U diag(s) V^T the adapted one, thin SVDs both, the j-th direction of
W', j < top_k, is an intruder if

    max_i |cos(U0_i, U_j)| < epsilon          over all i with s0_i > 0.

Shapes are those of :mod:`loraloom.update.update`: W (out, in), A (r, in), B (out, r) folded to scale 1. Whole models
are looped over in :mod:`loraloom.intruders.live`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraloom.intruders.solvers.basis import LeftBasis, left_basis
from loraloom.intruders.solvers.known_base import applicable, top_of_update
from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, AdaptedMatrix, Weight, row_norms, squared_norms, tiles
from loraloom.intruders.solvers.measure import decide
from loraloom.intruders.solvers.topk import Triplets, top_singular
from loraloom.update.lowrank import effective_rank, factored_svd, stable_rank
from loraloom.update.update import row_scale

# Up to this length of the shorter side a decomposition of W costs less than deciding without.
_SMALL = 256
FINDING = "Looking for intruders"  # what a progress is told
# Vectors less accurate than this, or a cosine nearer than this to epsilon, are computed again in float64.
_DOUBTFUL = 1e-3


@dataclass(frozen=True)
class LayerIntruders:
    """What was found in one matrix."""

    name: str
    """The module, or whatever the caller named it."""
    shape: tuple[int, int]
    """(out, in) of the weight as a matrix."""
    rank: int
    """Rows of A."""
    singular_values: list[float]
    """The top_k singular values of W'."""
    cosines: list[float]
    """For each, the largest cosine with a left singular vector of W; see ``exact``."""
    exact: bool
    """True: cosines are exact. False (W was not decomposed): upper bounds for intruders, lower bounds for the rest."""
    intruders: list[int]
    """Indices into ``singular_values``, ascending."""
    effective_rank: float
    """Effective rank of B A, by entropy: see :func:`loraloom.update.lowrank.effective_rank`."""
    stable_rank: float
    """Stable rank of B A: see :func:`loraloom.update.lowrank.stable_rank`."""
    relative_norm: float | None
    """``||W' - W|| / ||W||`` in the Frobenius norm; None for W = 0."""
    vectors: Triplets = field(repr=False, compare=False)
    """Singular triplets of the intruders alone, in their order."""
    row_scale: Tensor | None = field(default=None, repr=False, compare=False)
    """DoRA's ``m / rownorm(W + B A)`` (out,), or None."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the vectors, ready for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rank": self.rank,
            "singular_values": self.singular_values,
            "cosines": self.cosines,
            "exact": self.exact,
            "intruders": self.intruders,
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "relative_norm": self.relative_norm,
        }


@torch.no_grad()
def analyse_matrix(
    W: Weight,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None = None,
    base_left: LeftBasis | None = None,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    name: str = "",
) -> LayerIntruders:
    """The intruders among the top_k singular directions of ``W' = W + B A``, or of DoRA's ``m (W + B A) / rownorm``.

    W' is never formed. With ``base_left`` the cosines are computed, and ``W + B A`` takes few products with W, see
    ``solvers.known_base``. Without it, intruders of matrices with more than 256 rows and columns are
    decided by ``solvers.measure.decide``, and W is decomposed only where that leaves something open.
    Verdicts are those of a full SVD, except that they may differ where a cosine is within 1e-3 of
    epsilon, or singular values of W are within 1e-5 of each other (relative to the largest).

    Args:
        W: base weight (out, in): a tensor, or a ``TiledMatrix``. Read only.
        A, B: folded factors (r, in), (out, r).
        magnitude: DoRA's m (out,), or None.
        base_left: of W, as :func:`loraloom.intruders.solvers.basis.left_basis` or a ``BasisCache`` gives it.
        top_k: how many directions of W' to look at (the paper's k).
        epsilon: the threshold, in (0, 1).
        name: for the report.

    Raises:
        ValueError: top_k is under 1, or epsilon not in (0, 1).
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k!r} must be a positive integer.")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon!r} must lie in (0, 1): it is a cosine.")
    if isinstance(W, Tensor):
        W = W.float()  # once, and not in every product
    A, B = A.to(W.device), B.to(W.device)
    c = None if magnitude is None else row_scale(magnitude.to(W.device).float(), row_norms(W, A, B))
    matrix = AdaptedMatrix(W, A, B, c)
    top, known_cosine = _first_triplets(matrix, base_left, top_k)
    left = base_left
    if left is None and min(W.shape) > _SMALL:
        intruder, decided, cosine = decide(W, top.U.float(), epsilon, top.error.float())
        if not decided.all():
            left = left_basis(W)
    elif left is None:
        left = left_basis(W)
    if left is not None:
        cosine = _largest_cosine(left, top.U) if known_cosine is None else known_cosine
        if (cosine - epsilon).abs().min() <= _DOUBTFUL and top.U.dtype != torch.float64:
            top = top_singular(matrix, top_k, tolerance=1e-9, dtype=torch.float64)
            cosine = _largest_cosine(left, top.U)
        intruder = cosine < epsilon
    found = (intruder & (RELATIVE_ZERO * top.S[0] < top.S)).nonzero()[:, 0]
    S = factored_svd(A, B)[1]
    return LayerIntruders(
        name=name,
        shape=matrix.shape,
        rank=len(A),
        singular_values=top.S.tolist(),
        cosines=cosine.tolist(),
        exact=left is not None,
        intruders=found.tolist(),
        effective_rank=effective_rank(S),
        stable_rank=stable_rank(S),
        relative_norm=_relative_norm(matrix, S),
        vectors=Triplets(
            top.U[:, found].float(), top.S[found].float(), top.Vh[found].float(), top.error[found].float()
        ),
        row_scale=c,
    )


def _first_triplets(matrix: AdaptedMatrix, base: LeftBasis | None, k: int) -> tuple[Triplets, Tensor | None]:
    """The k largest triplets of W', and the largest cosine of each where finding them has given that too."""
    if base is not None and applicable(matrix, base, k):
        known = top_of_update(matrix, base, k)
        if known.top.error.max() <= _DOUBTFUL:
            return known
    top = top_singular(matrix, k)
    if top.error.max() > _DOUBTFUL:
        top = top_singular(matrix, k, tolerance=1e-9, dtype=torch.float64)
    return top, None


def _largest_cosine(left: LeftBasis, U: Tensor) -> Tensor:
    if not len(left.S):  # W = 0
        return U.new_zeros(U.shape[1])
    return (U.to(left.U.dtype).T @ left.U.to(U.device)).abs().amax(1).clamp_max(1)


def _relative_norm(matrix: AdaptedMatrix, S: Tensor) -> float | None:
    W, A, B, c = matrix.W, matrix.A, matrix.B, matrix.c
    base = squared_norms(W)
    if not base.any():
        return None
    if c is None:
        change = S.double().square().sum()
    else:
        # c (W + D) - W row by row: (c - 1)^2 ||W||^2 + 2 (c - 1) c <W, D> + c^2 ||D||^2.
        B = B.float()
        cross = torch.cat([((tile @ A.float().T) * B[rows]).sum(1) for rows, tile in tiles(W, torch.float32)])
        delta = ((B @ (A.float() @ A.float().T)) * B).sum(1)
        change = ((c - 1).square() * base + 2 * (c - 1) * c * cross + c.square() * delta).double().sum().clamp_min(0)
    return math.sqrt(float(change) / float(base.double().sum()))
