"""The adapted weight: ``W' = m * (W + D) / rownorm(W + D)``.

Shapes: W and D (out, in), m and rownorm (out,). Source: DoRA 2402.09353.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraloom.update.terms import Term, compute_dtype, fold


def delta_weight(terms: Sequence[Term]) -> Tensor:
    """The update D (out, in), in at least float32."""
    A, B = fold(terms)
    return B @ A


def squared_row_norm(W: Tensor) -> Tensor:
    """``||W_i||^2`` for each row of W (out, in), in at least float32."""
    return torch.linalg.vector_norm(W, dim=1, dtype=compute_dtype(W)).square()


def adapted_row_norm(W: Tensor, W_squared: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``||W_i + (B A)_i||`` for each row, without forming B A.

    ||W + B A||^2 = ||W||^2 + 2 rowsum((W A^T) * B) + rowsum((B (A A^T)) * B),

    which costs O(out in r) in place of O(out in r) plus three passes over an (out, in) temporary. Where a row all but
    cancels (under 1e-3 of the length it was made of) the expansion has lost its digits, so it is kept above zero and a
    caller that divides by it stays finite.

    Args:
        W: base weight (out, in).
        W_squared: ``squared_row_norm(W)`` (out,).
        A, B: folded factors (r, in) and (out, r), see :func:`fold`.

    Returns:
        (out,) in at least float32, positive.
    """
    dtype = compute_dtype(A, B)
    # A base in another dtype is converted a few rows at a time: no copy of W as a whole.
    blocks = [W] if W.dtype == dtype else W.split(1024)
    product = torch.cat([block.to(dtype) @ A.T for block in blocks])
    cross = product.mul_(2).add_(B @ (A @ A.T)).mul_(B).sum(dim=1)
    return (W_squared + cross).clamp_min_(torch.finfo(dtype).tiny).sqrt_()
