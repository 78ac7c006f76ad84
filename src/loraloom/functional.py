"""The adapter's maths, as pure functions on tensors.

    W' = m * (W + D) / rownorm(W + D),    D = sum_n g_n s_n B_n M_n A_n,    y = x W'^T + bias

Shapes: x (tokens, in), A (r, in), M (r, r), B (out, r), g (1,) or (r,), m and rownorm (out,), W and D (out, in). M, g
and m are optional. Sources: LoRA 2106.09685, MoSLoRA 2406.11909, WeightLoRA 2506.02724, DoRA 2402.09353 (the norm is
a constant in the backward pass, section 4.3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.autograd import AdaptedLinear

# Above this the node by hand, which works in one buffer of the output's size where autograd takes three, is the faster
# way to DoRA, below it its Python costs more than that saves (measured on two CPU cores).
_FEW_TOKENS = 256


class Term(NamedTuple):
    """One product ``g s B M A`` of the sum; the matrices of convolutions are flattened to two dimensions."""

    A: Tensor
    B: Tensor
    M: Tensor | None = None
    gate: Tensor | None = None
    scaling: float = 1.0


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """At least float32: the dtype in which weights are combined (bf16 products would round away small updates)."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def scale(term: Term) -> Tensor | float:
    """``g s``: a float, or with a gate a tensor of the gate's shape."""
    return term.scaling if term.gate is None else term.gate * term.scaling


def stack(terms: Sequence[Term]) -> Term:
    """One term equal to the sum of several: the As above each other, the Bs side by side (exact, any ranks).

    Mixers are multiplied into A, scales become a gate with one entry per row of A. Differentiable.
    """
    if len(terms) == 1:
        return terms[0]
    gates = [
        torch.full((t.A.shape[0],), t.scaling, device=t.A.device, dtype=torch.float32)
        if t.gate is None
        else (t.gate * t.scaling).expand(t.A.shape[0])
        for t in terms
    ]
    A = torch.cat([t.A if t.M is None else t.M.to(t.A.dtype) @ t.A for t in terms])
    return Term(A, torch.cat([t.B for t in terms], dim=1), None, torch.cat(gates))


def fold(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Plain LoRA factors with scale 1: A' (sum r, in) and B' (out, sum r) with ``B' A' = sum_n g_n s_n B_n M_n A_n``.

    Exact up to one rounding of each factor in at least float32.
    """
    dtype = compute_dtype(*(factor for term in terms for factor in (term.A, term.B)))
    # Before they are multiplied: terms may all but cancel, and rounding M A would not.
    term = stack(
        [t._replace(A=t.A.to(dtype), B=t.B.to(dtype), M=None if t.M is None else t.M.to(dtype)) for t in terms]
    )
    A, B = term.A, term.B
    if term.M is not None:
        A = term.M.to(dtype) @ A
    return A, B * scale(term)


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


def adapted_linear(
    x: Tensor,
    term: Term,
    *,
    base_out: Tensor | None = None,
    W: Tensor | None = None,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The output of an adapted linear layer: ``y = c (x W^T + g s drop(x) A^T M^T B^T) + bias``.

    Args:
        x: input (..., in).
        term: the low-rank update.
        base_out: the base layer's output ``x W^T + bias`` (..., out) where something else computes it. Not changed.
        W: the base weight (out, in), when base_out is not given.
        bias: the base layer's bias (out,), which DoRA does not scale.
        magnitude, norm: DoRA's m and ``rownorm(W + D)`` (out,), for c = m / norm; both or neither.
        dropout: probability of zeroing an entry of x on the low-rank path, in [0, 1).

    Returns:
        (..., out) in the dtype of the base layer's output. Differentiable with respect to every tensor but norm; where
        dtypes differ, with dropout, and with a magnitude on many tokens, once.
    """
    uniform = x.dtype is term.A.dtype and not dropout and not torch.is_autocast_enabled(x.device.type)
    few = magnitude is None or x.numel() <= _FEW_TOKENS * x.shape[-1]
    if (uniform and few) or torch.compiler.is_compiling():
        return _composed(x, term, base_out, W, bias, magnitude, norm, dropout)
    A, B, M, gate, scaling = term
    # Flat outside the node: a view made inside could not be changed in place, as ReLU(inplace=True) does.
    x2 = x.reshape(-1, x.shape[-1])
    z = None if base_out is None else base_out.reshape(-1, base_out.shape[-1])
    y = AdaptedLinear.apply(x2, A, B, M, gate, scaling, dropout, z, W, bias, magnitude, norm)
    return y.view(*x.shape[:-1], B.shape[0])


def _composed(
    x: Tensor,
    term: Term,
    base_out: Tensor | None,
    W: Tensor | None,
    bias: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    dropout: float,
) -> Tensor:
    """The same from torch's own operations, for one dtype and for compilers.

    They save no more than the node by hand does: x, h, and with a magnitude z. The update is added by one ``addmm``,
    without a pass of its own over the output.
    """
    has_norm = magnitude is not None and norm is not None
    x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if base_out is None:
        z = F.linear(x2, W, None if has_norm else bias)  # type: ignore[arg-type]
    else:
        z = base_out.reshape(-1, base_out.shape[-1])
        z = z - bias if has_norm and bias is not None else z
    dtype = z.dtype
    h = F.linear((F.dropout(x2, dropout) if dropout else x2).to(term.A.dtype), term.A)
    if term.M is not None:
        h = F.linear(h, term.M)
    if term.gate is not None:
        h = (h * scale(term)).to(h.dtype)  # a gate is float32 whatever the factors are
    alpha = 1.0 if term.gate is not None else term.scaling
    if z.dtype is not h.dtype or h.dtype is not term.B.dtype:  # only where a compiler fuses it
        z = z + F.linear(h, term.B.to(h.dtype)) * alpha
    elif base_out is None:
        z = z.addmm_(h, term.B.t(), alpha=alpha)  # z is nobody else's
    else:
        z = torch.addmm(z, h, term.B.t(), alpha=alpha)
    if magnitude is not None and norm is not None:
        c = magnitude / norm
        z = z * c if bias is None else torch.addcmul(bias, z, c)
    z = z.to(dtype)
    return z if x2 is x else z.view(*x.shape[:-1], z.shape[-1])


def rescale(z: Tensor, c: Tensor, bias: Tensor | None, channel_dim: int = -1) -> Tensor:
    """DoRA's last step, ``c (z - bias) + bias`` along one dimension of z; differentiable."""
    shape = [1] * z.dim()
    shape[channel_dim] = -1
    if bias is None:
        return c.view(shape) * z
    return c.view(shape) * (z - bias.view(shape)) + bias.view(shape)
