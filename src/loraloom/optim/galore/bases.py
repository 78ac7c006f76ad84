"""The maths of GaLore and its successors: pure functions on one weight's gradient G (m, n).

    right side   P (n, r)             R = G P         (m, r)      back(N) = N P^T
    left side    P (m, r)             R = P^T G       (r, n)      back(N) = P N
    full         L (m, r), P (n, r)   R = L^T G P     (r, r)      back(N) = L N P^T

Bases are a pair (left, right) whose missing side is None, with orthonormal columns unless drawn at random. Everything
is computed in the dtype of its arguments; callers pass float32 or float64.
"""

from typing import get_args

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.optim.options import Side

Bases = tuple[Tensor | None, Tensor | None]
# Gaussian columns beside a basis that is renewed. The cut at the rank falls between nearly equal singular values, and
# only columns beyond it tell them apart; this many cost less than a second iteration, and nothing at small ranks.
OVERSAMPLING = 32


def sides_of(side: Side, shape: tuple[int, int]) -> tuple[bool, bool]:
    """Which sides of an (m, n) gradient are projected, as (left, right).

    GaLore (arXiv 2403.03507) projects the short axis, so that the compact gradient keeps the long one: "std" is the
    right side if m >= n, else the left. "reverse_std" is the other side; the rest say it themselves.

    Raises:
        InputError: the side is unknown.
    """
    if side not in get_args(Side):
        raise InputError(f"side={side!r} is unknown; use one of {', '.join(get_args(Side))}", code="unknown-choice")
    if side == "full":
        return True, True
    tall = shape[0] >= shape[1]
    right = side == "right" or (side == "std" and tall) or (side == "reverse_std" and not tall)
    return not right, right


def project(G: Tensor, bases: Bases) -> Tensor:
    """R = L^T G P, where a missing side is left out. (m, n) to the compact shape."""
    left, right = bases
    if left is not None:
        G = left.mT @ G
    return G if right is None else G @ right


def project_back(N: Tensor, bases: Bases) -> Tensor:
    """L N P^T, the transpose of `project`. The compact shape to (m, n)."""
    left, right = bases
    if left is not None:
        N = left @ N
    return N if right is None else N @ right.mT


def svd_bases(G: Tensor, rank: int, sides: tuple[bool, bool]) -> Bases:
    """The first `rank` left or right singular vectors of G (arXiv 2403.03507), by a full SVD."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return (U[:, :rank].contiguous() if sides[0] else None, Vh[:rank].mT.contiguous() if sides[1] else None)


def subspace_bases(
    G: Tensor, rank: int, sides: tuple[bool, bool], previous: Bases, generator: torch.Generator
) -> Bases:
    """Approximate leading singular vectors of G, by subspace iteration from the previous bases.

    For the right side, with Omega `OVERSAMPLING` Gaussian columns:

        Y = orth(G [P_old, Omega])      Z = G^T Y = Q T      P = Q U_r,  U_r the first left singular vectors of T

    These are two thin products, two QRs and the SVD of a small T: 4 m n r operations and O((m + n) r^2), against
    O(m n min(m, n)) for an SVD of G. One such iteration is enough from a warm start, because the gradient's leading
    subspace moves slowly; without a previous basis three are taken from a Gaussian one (Halko, Martinsson, Tropp, SIAM
    Review 2011, algorithm 4.4). Columns get the sign that they had, since the inner optimizer's momentum stays.

    Args:
        G: (m, n), finite and not zero.
        rank: columns of each basis, less than min(m, n).
        sides: the result of `sides_of`.
        previous: the old bases; None where there is none.
        generator: draws Omega, on the CPU, so that every device and rank draws the same.
    """
    left, right = previous
    return (
        _leading(G.mT, rank, left, generator) if sides[0] else None,
        _leading(G, rank, right, generator) if sides[1] else None,
    )


def _leading(G: Tensor, rank: int, old: Tensor | None, generator: torch.Generator) -> Tensor:
    """Approximate leading right singular vectors of G (m, n), as columns (n, rank)."""
    columns = min(rank + OVERSAMPLING, *G.shape) - (0 if old is None else rank)
    P = torch.randn(G.shape[1], columns, generator=generator, dtype=G.dtype).to(G.device)
    if old is not None:
        P = torch.cat([old, P], dim=1)
    for _ in range(3 if old is None else 1):
        Y = torch.linalg.qr(G @ P).Q
        P, T = torch.linalg.qr(G.mT @ Y)
    P = P @ torch.linalg.svd(T).U[:, :rank]
    return P if old is None else P * torch.where((P * old).sum(0) < 0, -1.0, 1.0).to(P.dtype)


def random_bases(shape: tuple[int, int], rank: int, sides: tuple[bool, bool], seed: int, like: Tensor) -> Bases:
    """Gaussian bases with entries of variance 1/rank, which keep norms in expectation (APOLLO, arXiv 2412.05270).

    Args:
        shape: (m, n).
        rank, sides: as in `subspace_bases`.
        seed: the same seed gives the same bases, so that they need not be stored.
        like: a tensor of the dtype and device wanted.
    """
    generator = torch.Generator(like.device).manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.randn(size, rank, generator=generator, dtype=like.dtype, device=like.device) / rank**0.5

    return (draw(shape[0]) if sides[0] else None, draw(shape[1]) if sides[1] else None)


def quantize(P: Tensor) -> tuple[Tensor, Tensor]:
    """A basis (n, r) in 8 bits: integers (n, r) between -127 and 127, and the scale of each column, (r,)."""
    scale = P.abs().amax(0) / 127
    return (P / scale).round().to(torch.int8), scale


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize`, up to half a scale in each entry."""
    return integers * scale


def change_of_bases(new: Bases, old: Bases) -> Bases:
    """C = P_new^T P_old, (r, r), for each side that there is."""
    left, right = (None if a is None or b is None else a.mT @ b for a, b in zip(new, old, strict=True))
    return left, right


def rotate(M: Tensor, change: Bases) -> Tensor:
    """A compact linear statistic, such as a momentum, in the new bases: C_left M C_right^T."""
    left, right = change
    return project_back(M, (left, right))


def rotate_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, change: Bases, step: float, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Adam's moments in the new bases, by the projection-aware rule of LDAdam (arXiv 2410.16103).

    With the bias-corrected m and v, C = P_new^T P_old and C^2 its elementwise square (left side):

        m' = (1 - b1^t) C m        v' = (1 - b2^t) |C^2 (v - m^2) + (C m)^2|

    Args:
        exp_avg, exp_avg_sq: Adam's averages, in the compact shape.
        change: the result of `change_of_bases`.
        step: t, how many steps the averages have had; at least 1.
        betas: Adam's.
    """
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    m, v = exp_avg / correction1, exp_avg_sq / correction2
    left, right = change
    squares = (None if left is None else left.square(), None if right is None else right.square())
    turned = rotate(m, change)
    return turned * correction1, (rotate(v - m.square(), squares) + turned.square()).abs() * correction2


def norm_ratio(N: Tensor, R: Tensor, sides: tuple[bool, bool], whole: bool = False) -> Tensor:
    """How much an optimizer scaled a compact gradient R to make the update N: ||N_j|| / ||R_j||.

    Per channel of the axis that was not projected, (m, 1) or (1, n): phi of Fira (arXiv 2410.01623) and s
    of APOLLO (arXiv 2412.05270). With `whole` one ratio of the Frobenius norms, (1, 1), as in APOLLO-Mini.
    """
    axes = (0, 1) if whole else (0,) if sides[0] else (1,)
    return torch.linalg.vector_norm(N, dim=axes, keepdim=True) / (
        torch.linalg.vector_norm(R, dim=axes, keepdim=True) + 1e-8
    )


def limit_growth(S: Tensor, previous: Tensor | None, gamma: float = 1.01) -> tuple[Tensor, Tensor]:
    """Fira's norm-growth limiter: S, shortened to `gamma` times the previous norm if it is longer, and its norm.

    Args:
        S: any shape.
        previous: the norm that this function returned at the last step; None at the first.
        gamma: the largest growth from step to step; 1.01 in the paper (arXiv 2410.01623) and in APOLLO.
    """
    norm = torch.linalg.vector_norm(S)
    if previous is None:
        return S, norm
    factor = (gamma * previous / norm.clamp(min=1e-38)).clamp(max=1.0)
    # A norm of exactly zero would hold all later steps at zero.
    factor = torch.where(previous > 0, factor, torch.ones_like(factor))
    return S * factor, norm * factor
