"""The low-rank path of a linear layer: what it adds to the output and to the gradients, derived by hand.

z = ... + u B^T with u = sigma k, k = h M^T, h = x A^T; the gradients are in `loraloom.update.node`. Factors are A, B, M
and sigma in the dtype of computation, see :func:`factors_in`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor | None, Tensor | float]


def add_update(z: Tensor, x: Tensor, factors: Factors, mask: Any, fresh: bool) -> tuple[Tensor, Tensor]:
    """``z + u B^T`` (tokens, out), in z's memory if it is fresh, and h (tokens, r)."""
    A, B, M, sigma = factors
    x = as_dtype(x, A.dtype)
    h = (x if mask is None else x * mask(x)) @ A.t()
    u, s = _scaled(h if M is None else h @ M.t(), sigma)
    if z.dtype is u.dtype:
        return z.addmm_(u, B.t(), alpha=s) if fresh else torch.addmm(z, u, B.t(), alpha=s), h
    if torch.promote_types(z.dtype, u.dtype) is u.dtype:  # rounded once, to the base's precision
        exact = z.to(u.dtype).addmm_(u, B.t(), alpha=s)
        return z.copy_(exact) if fresh else exact.to(z.dtype), h
    return torch.add(z, u @ B.t(), alpha=s, out=z if fresh else None), h


def _scaled(k: Tensor, sigma: Tensor | float) -> tuple[Tensor, float]:
    """``u / s`` and s: a number is left to the product that uses u."""
    return (k * sigma, 1.0) if isinstance(sigma, Tensor) else (k, sigma)


def _product(a: Tensor, b: Tensor, s: float) -> Tensor:
    """``s a b`` in one launch."""
    return a @ b if s == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=s)


class Sums(NamedTuple):
    """Gradients that are sums over tokens; those not asked for are None."""

    A: Tensor | None
    B: Tensor | None
    M: Tensor | None = None
    sigma: Tensor | None = None


def add_gradient(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    h: Tensor,
    factors: Factors,
    mask: Any,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Sums]:
    """dx (tokens, in) plus the low-rank path's share, in dx's memory if it is given, and the sums; g is G."""
    A, B, M, sigma = factors
    needs_x, needs_A, needs_B, needs_M, needs_gate = needs
    g, x = as_dtype(g, A.dtype), as_dtype(x, A.dtype)
    k = h if M is None else h @ M.t()
    sum_B = None
    if needs_B:  # not (u^T G)^T: it comes out transposed, and autograd would copy it
        u, s = _scaled(k, sigma)
        sum_B = _product(g.t(), u, s)
    if not any((needs_x, needs_A, needs_M, needs_gate)):
        return dx, Sums(None, sum_B)
    t = g @ B
    sum_sigma = (t * k).sum(0, dtype=accumulator(t.dtype)) if needs_gate else None
    t, s = _scaled(t, sigma)
    sum_M = _product(t.t(), h, s) if needs_M else None
    if M is not None:
        t = t @ M
    factor = None if mask is None else mask(x)
    sum_A = _product(t.t(), x if factor is None else x * factor, s) if needs_A else None
    if needs_x:
        if dx is not None and factor is None and dx.dtype == t.dtype:
            dx.addmm_(t, A, alpha=s)
        else:
            share = _product(t, A, s)
            share = share if factor is None else share.mul_(factor)
            dx = share if dx is None else dx.add_(share)
    return dx, Sums(sum_A, sum_B, sum_M, sum_sigma)


def factors_in(
    A: Tensor, B: Tensor, M: Tensor | None, gate: Tensor | None, scaling: float, dtype: torch.dtype
) -> Factors:
    """A, B, M and sigma in the dtype of computation."""
    sigma = scaling if gate is None else (gate * scaling).to(dtype)
    return as_dtype(A, dtype), as_dtype(B, dtype), as_dtype_or_none(M, dtype), sigma


def as_dtype(tensor: Any, dtype: torch.dtype) -> Tensor:
    # Tensor.to would find out the same, but in a microsecond, which counts where a layer takes a millisecond.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def as_dtype_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else as_dtype(tensor, dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def up(tensor: Tensor) -> Tensor:
    return tensor.to(accumulator(tensor.dtype))
