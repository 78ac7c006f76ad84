"""An adapted linear layer: ``y = c (x W^T + g s drop(x) A^T M^T B^T) + bias`` with ``c = m / rownorm(W + D)``.

Shapes: x (..., in), y (..., out), m and rownorm (out,). DoRA's norm is a constant in the backward pass (2402.09353,
section 4.3).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.update.node import AdaptedLinear, LinearMap, Weight
from loraloom.update.one_pass import MakeNorm, OnePass
from loraloom.update.rescale import Rescaled
from loraloom.update.terms import Term, autocast_dtype, scale
from loraloom.update.traced import is_traced
from loraloom.update.update import row_scale

# With more tokens than this, the nodes are faster: autograd makes another buffer of the input's size, and for DoRA two
# of the output's. With fewer, their Python overhead dominates (measured on two CPU cores).
_FEW_TOKENS = 256


def adapted_linear(
    x: Tensor,
    term: Term,
    *,
    base_out: Tensor | None = None,
    W: Weight | None = None,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | MakeNorm | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The output of an adapted linear layer: ``y = c (x W^T + g s drop(x) A^T M^T B^T) + bias``.

    Args:
        x: input (..., in).
        term: the low-rank update.
        base_out: the base layer's output ``x W^T + bias`` (..., out) where something else computes it. Not changed.
        W: the base weight (out, in), or a map in its place, when base_out is not given. A map takes no magnitude beside
            a bias, and is not compiled.
        bias: the base layer's bias (out,), which DoRA does not scale.
        magnitude, norm: DoRA's m and ``rownorm(W + D)`` (out,), for c = m / norm; both or neither. In place of the norm
            a function that computes it, which may be given ``W A^T`` (out, r).
        dropout: probability of zeroing an entry of x on the low-rank path, in [0, 1).

    Returns:
        (..., out) in the dtype of the base layer's output. Differentiable with respect to every tensor but norm.
    """
    uniform = x.dtype is term.A.dtype and not dropout and autocast_dtype(x.device.type) is None
    few = x.numel() <= _FEW_TOKENS * x.shape[-1]
    # The node's generator needs numbers; without dropout it shows on the meta device what an accelerator would do.
    traced = is_traced() or (dropout and x.is_meta)
    if norm is not None and uniform and few and not traced and _in_one_pass(x, term, W, magnitude):
        parts = term.A, term.B, term.scaling, W, bias, magnitude, norm
        return OnePass.apply(x.reshape(-1, x.shape[-1]), *parts).view(*x.shape[:-1], term.B.shape[0])
    norm = norm if norm is None or isinstance(norm, Tensor) else norm(None)
    if ((uniform and few) or traced) and not isinstance(W, LinearMap):
        return _composed(x, term, base_out, W, bias, magnitude, norm, dropout)
    A, B, M, gate, scaling = term
    # Flat outside the node: a view made inside could not be changed in place, as ReLU(inplace=True) does.
    x2 = x.reshape(-1, x.shape[-1])
    z = None if base_out is None else base_out.reshape(-1, base_out.shape[-1])
    if magnitude is None or norm is None:
        y = AdaptedLinear.apply(x2, A, B, M, gate, scaling, dropout, z, W, None if base_out is not None else bias)
    else:
        z = z - bias.to(z.dtype) if z is not None and bias is not None else z
        z = AdaptedLinear.apply(x2, A, B, M, gate, scaling, dropout, z, W, None)
        y = Rescaled.apply(z, magnitude, norm, bias, base_out is None)
    return y.view(*x.shape[:-1], B.shape[0])


def _in_one_pass(x: Tensor, term: Term, W: Any, magnitude: Any) -> bool:
    """Whether `loraloom.update.one_pass` computes the layer: on the CPU, in float32 throughout."""
    tensors = (x, W, term.A, term.B, magnitude)
    return (
        term.M is None
        and term.gate is None
        and x.device.type == "cpu"
        and all(isinstance(t, Tensor) and t.dtype is torch.float32 for t in tensors)
        and not torch.is_inference_mode_enabled()
    )


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
        dtype = z.dtype
    else:
        z = base_out.reshape(-1, base_out.shape[-1])
        dtype = z.dtype
        z = z - bias if has_norm and bias is not None else z
    h = F.linear((F.dropout(x2, dropout) if dropout else x2).to(term.A.dtype), term.A)
    if term.M is not None:
        h = F.linear(h, term.M)
    if term.gate is not None:
        h = (h * scale(term)).to(h.dtype)  # a gate is float32 whatever the factors are
    alpha = 1.0 if term.gate is not None else term.scaling
    if z.dtype is not h.dtype or h.dtype is not term.B.dtype or is_traced():  # a compiler fuses it
        z = z + F.linear(h, term.B.to(h.dtype)) * alpha
    elif base_out is None:
        z = z.addmm_(h, term.B.t(), alpha=alpha)  # z is nobody else's
    else:
        z = torch.addmm(z, h, term.B.t(), alpha=alpha)
    if magnitude is not None and norm is not None:
        c = row_scale(magnitude, norm)
        z = z * c if bias is None else torch.addcmul(bias, z, c)
    z = z.to(dtype)
    return z if x2 is x else z.view(*x.shape[:-1], z.shape[-1])
