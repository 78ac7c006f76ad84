"""The update of one module, and the weight that it makes: ``W' = m * (W + D) / rownorm(W + D)``, or ``W + D``.

Shapes: W and D (out, in), m and rownorm (out,). Source: DoRA 2402.09353. Nothing else divides by a row norm.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.update import split
from loraloom.update.terms import Term, autocast_dtype, compute_dtype, fold, without_autocast
from loraloom.update.traced import is_traced

# A row whose squared norm is under this share of ||W_i||^2 has cancelled. The expansion of row_norm adds numbers of
# size s = ||W_i||^2 + ||D_i||^2, each to a few units u of float32. Above the share, s is at most 221 times the result,
# so the norm has a relative error under 4 u * 221 / 2 = 3e-5.
_CANCELLED = 1e-2
_DIRECT_ROWS = 64


class Update(NamedTuple):
    """What an adapter does to one module.

    Attributes:
        terms: the low-rank update is their sum, ``D = sum_n g_n s_n B_n M_n A_n``.
        magnitude: DoRA's m (out,), or None.
        bias: what the update adds to the module's bias (out,), or None.
    """

    terms: Sequence[Term]
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) with ``B A = D``, see :func:`loraloom.update.terms.fold`."""
        return fold(self.terms)

    def delta(self) -> Tensor:
        """D (out, in), in at least float32."""
        A, B = self.factors()
        return B @ A

    def row_norm(self, W: Tensor, W_squared: Tensor | None = None) -> Tensor:
        """``||W_i + D_i||`` (out,) without forming D, see :func:`row_norm`."""
        return row_norm_of(W, self.terms, W_squared)

    def adapted_weight(self, W: Tensor) -> Tensor:
        """W' (out, in), in at least float32."""
        D = self.delta()
        adapted = D + W.to(compute_dtype(W, D))
        if self.magnitude is None:
            return adapted
        norm = torch.linalg.vector_norm(adapted.detach(), dim=1)
        return adapted * row_scale(self.magnitude.to(norm.dtype), norm)[:, None]

    def change(self, W: Tensor) -> Tensor:
        """``W' - W`` (out, in), in at least float32: D, and with a magnitude the rescaling of W as well."""
        return self.delta() if self.magnitude is None else self.adapted_weight(W) - W


def row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``c = m / norm`` (out,), and 0 where the norm is 0: a row of zeros stays one, whatever m is."""
    return magnitude / F.threshold(norm, 0.0, math.inf)


def squared_row_norm(W: Tensor) -> Tensor:
    """``||W_i||^2`` for each row of W (out, in), in at least float32."""
    return torch.linalg.vector_norm(W, dim=1, dtype=compute_dtype(W)).square()


@torch.no_grad()
def row_norm(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    W_squared: Tensor | None = None,
    scaling: float = 1.0,
    W_A: Tensor | None = None,
) -> Tensor:
    """``||W_i + s (B A)_i||`` for each row, without forming B A.

    ||W + s B A||^2 = ||W||^2 + s rowsum((2 W A^T + s B (A A^T)) * B),

    which costs O(out in r) in place of O(out in r) plus three passes over an (out, in) temporary. The expansion has
    lost its digits where a row all but cancels; those rows are added up and measured. An accelerator or a compiler must
    not wait for their number: there it is always the 64 rows nearest to cancelling, and the others are kept off zero.

    Args:
        W: base weight (out, in).
        A, B: factors (r, in) and (out, r).
        W_squared: :func:`squared_row_norm` of W (out,), where it is known.
        scaling: s.
        W_A: ``W A^T`` (out, r) where it is known.

    Returns:
        (out,) in at least float32, without gradient: to DoRA the norm is a constant. 0 for a row of zeros. Divide by it
        with :func:`row_scale`.
    """
    with without_autocast(W.device.type):
        return _row_norm(W, A, B, W_squared, scaling, W_A)


def _row_norm(W: Tensor, A: Tensor, B: Tensor, W_squared: Tensor | None, scaling: float, W_A: Tensor | None) -> Tensor:
    dtype = compute_dtype(A, B)
    W_squared = squared_row_norm(W) if W_squared is None else W_squared
    W_A = _times_transposed(W, A) if W_A is None else W_A
    sums = torch.addmm(W_A, B, A @ A.T, beta=2, alpha=scaling).mul_(B).sum(dim=1)
    squared = torch.add(W_squared, sums, alpha=scaling)
    if W.device.type == "cpu" and not is_traced(W, A):
        share = squared / W_squared
        norm = squared.sqrt_()
        if share.min().item() > _CANCELLED:
            return norm
        rows = (share > _CANCELLED).logical_not_().nonzero()[:, 0]  # NaN is 0 / 0, a row of zeros
    else:
        norm = torch.maximum(squared, torch.finfo(dtype).eps * W_squared).sqrt_()
        rows = (squared / W_squared).topk(min(_DIRECT_ROWS, W.shape[0]), largest=False).indices
    blocks = [
        torch.linalg.vector_norm(torch.addmm(W[i].to(dtype), B[i], A, alpha=scaling), dim=1) for i in rows.split(1024)
    ]
    return norm.index_copy(0, rows, (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).to(norm.dtype))


def row_norm_of(W: Tensor, terms: Sequence[Term], W_squared: Tensor | None = None, W_A: Tensor | None = None) -> Tensor:
    """:func:`row_norm` for D = the sum of the terms; W_A is used where there is one term without a mixer."""
    if autocast_dtype(W.device.type) is not None:  # it would round W A^T
        with torch.autocast(W.device.type, enabled=False):
            return row_norm_of(W, terms, W_squared, W_A)
    A, B, M, gate, scaling = terms[0]
    if len(terms) == 1 and M is None and gate is None and compute_dtype(A) is A.dtype is B.dtype:
        return row_norm(W, A, B, W_squared, scaling, W_A)
    return row_norm(W, *fold(terms), W_squared)


def _times_transposed(W: Tensor, A: Tensor) -> Tensor:
    """``W A^T`` (out, r) in A's dtype, at least float32."""
    if W.dtype == A.dtype:
        return W @ A.T
    if A.dtype is torch.float32 and split.supported(W.device, W.dtype):
        r = len(A)
        product = split.product(W, split.split_rows(A)[: 2 * r].t())
        return product[:, :r] + product[:, r:]
    # No copy of W as a whole in the host's memory; an accelerator has room for one, and time for one launch.
    blocks = W.split(1024) if W.device.type == "cpu" else [W]
    return torch.cat([block.to(A.dtype) @ A.T for block in blocks])
