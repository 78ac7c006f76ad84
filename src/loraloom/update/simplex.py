"""Projections of a vector onto the sets that WeightLoRA constrains its gates to.

    K-sparse          {w : ||w||_0 <= k}                     keep the k largest entries, zero the rest
    simplex           {w : w >= 0, sum w = radius}           subtract one threshold, clamp at zero
    K-sparse simplex  the intersection of the two            keep the k largest, project those onto the simplex

The functions are pure: (n,) in, a new (n,) of the same dtype and device out. Ties go to the lowest index, so every
rank and every rerun chooses the same entries. The only host synchronisation is the check that the input is finite.
The three dataclasses at the end name a set together with its projection; `WeightAdam` takes one of them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


def project_k_sparse(
    w: Tensor, k: int, by: Literal["signed", "magnitude"] = "signed", nonnegative: bool = False
) -> Tensor:
    """Keep the k largest entries of w and set the rest to zero (arXiv 2506.02724, the K-sparse set).

    With ``nonnegative`` the result is the point of {v : v >= 0, ||v||_0 <= k} nearest to w, whatever ``by`` is. With
    ``by="magnitude"`` it is the nearest point of {v : ||v||_0 <= k}. The default ranks by signed value, as the
    reference WeightLoRA code does; it equals the nearest point as long as no negative entry has to be kept, that is,
    while w has k entries at or above zero. Below that it keeps the least negative ones, and applying it again may
    give another point, because the zeros now outrank them.

    Args:
        w: (n,) floating point, finite.
        k: number of entries to keep, 1 to n.
        by: rank the entries by their signed value or by their absolute value.
        nonnegative: also clamp at zero.

    Returns:
        (n,) in w's dtype, at most k entries non-zero; the entries kept are bit-identical to w's.

    Raises:
        ValueError: w is not a finite floating-point vector, k is out of range, or ``by`` is unknown.
    """
    _check_vector(w)
    _check_k(k, w)
    if by not in ("signed", "magnitude"):
        raise ValueError(f"by={by!r} is not a ranking; use 'signed' or 'magnitude'")
    if nonnegative:
        w = w.clamp(min=0)
    kept = _largest(w.abs() if by == "magnitude" else w, k)
    return torch.zeros_like(w).index_copy(0, kept, w[kept])


def project_simplex(w: Tensor, radius: float = 1.0) -> Tensor:
    """The point of the simplex {v : v >= 0, sum v = radius} nearest to w.

    The sorting algorithm of Duchi et al., "Efficient projections onto the l1-ball", ICML 2008, figure 1: with
    mu = w sorted in descending order, rho = max{j : j mu_j - (mu_1 + .. + mu_j) + radius > 0} and
    theta = (mu_1 + .. + mu_rho - radius) / rho, the answer is max(w - theta, 0). Exact up to float64 rounding.

    Args:
        w: (n,) floating point, finite.
        radius: sum of the result, positive and finite.

    Returns:
        (n,) in w's dtype.

    Raises:
        ValueError: w is not a finite floating-point vector, or the radius is not positive and finite.
    """
    _check_vector(w)
    _check_radius(radius)
    return nearest_in_simplex(w, radius)


def project_simplex_k_sparse(w: Tensor, k: int, radius: float = 1.0) -> Tensor:
    """The point of {v : v >= 0, sum v = radius, ||v||_0 <= k} nearest to w.

    Keeping the k largest entries and projecting those onto the simplex is exact, though the set is not convex:
    Kyrillidis et al., "Sparse projections onto the simplex", ICML 2013 (the greedy selector and simplex projector).

    Args:
        w: (n,) floating point, finite.
        k: largest number of non-zero entries, 1 to n.
        radius: sum of the result, positive and finite.

    Returns:
        (n,) in w's dtype, at most k entries non-zero.

    Raises:
        ValueError: w is not a finite floating-point vector, k is out of range, or the radius is not positive and
            finite.
    """
    _check_vector(w)
    _check_k(k, w)
    _check_radius(radius)
    kept = _largest(w, k)
    return torch.zeros_like(w).index_copy(0, kept, nearest_in_simplex(w[kept], radius))


class Constraint(Protocol):
    """A set of gate vectors with its projection."""

    def project(self, w: Tensor) -> Tensor:
        """The point of the set that replaces w; (n,) to (n,)."""
        ...


@dataclass(frozen=True)
class KSparse:
    """At most k gates are open: `project_k_sparse`. The reference code keeps k = 20 of 60."""

    k: int
    by: Literal["signed", "magnitude"] = "signed"
    nonnegative: bool = False

    def project(self, w: Tensor) -> Tensor:
        return project_k_sparse(w, self.k, self.by, self.nonnegative)


@dataclass(frozen=True)
class Simplex:
    """The gates are non-negative and share one budget: `project_simplex`."""

    radius: float = 1.0

    def project(self, w: Tensor) -> Tensor:
        return project_simplex(w, self.radius)


@dataclass(frozen=True)
class SimplexKSparse:
    """At most k gates share one budget: `project_simplex_k_sparse`."""

    k: int
    radius: float = 1.0

    def project(self, w: Tensor) -> Tensor:
        return project_simplex_k_sparse(w, self.k, self.radius)


def _largest(score: Tensor, k: int) -> Tensor:
    # topk leaves the order of ties open; a stable sort settles it.
    return torch.sort(score, descending=True, stable=True).indices[:k]


def nearest_in_simplex(w: Tensor, radius: float = 1.0) -> Tensor:
    """:func:`project_simplex` without its check, which waits for the device. An entry of -inf becomes 0, NaN stays."""
    # MPS has no float64.
    wide = w.to(torch.float32 if w.device.type == "mps" else torch.float64)
    # A constant shift does not move the projection, and entries more than `radius` below the largest project to zero
    # wherever they are: within [-radius, 0] the sums neither overflow nor cancel.
    wide = (wide - wide.max()).clamp(min=-radius)
    mu = torch.sort(wide, descending=True).values
    total = mu.cumsum(0)
    count = torch.arange(1, len(mu) + 1, device=mu.device, dtype=mu.dtype)
    rho = (count * mu - total + radius > 0).sum()
    theta = (total.gather(0, rho.view(1) - 1) - radius) / rho  # gather: indexing by a 0-d tensor waits for the device
    return (wide - theta).clamp(min=0).to(w.dtype)


def _check_vector(w: Tensor) -> None:
    if w.dim() != 1 or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(f"w has shape {tuple(w.shape)} and dtype {w.dtype}; pass a floating-point vector (n,), n >= 1")
    if not w.isfinite().all():
        index = int(w.isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"w[{index}] is {w[index].item()}; a projection needs finite values, so look for the NaN or "
            "overflow before it (a lower learning rate for w helps if it diverged)"
        )


def _check_k(k: int, w: Tensor) -> None:
    if not 1 <= k <= len(w):
        raise ValueError(f"k={k} is out of range: pass 1 to {len(w)}, the length of w")


def _check_radius(radius: float) -> None:
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius={radius} is out of range: pass a positive, finite number")
