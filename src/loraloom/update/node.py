"""An adapted linear layer as one autograd node: forward, and the gradients derived by hand.

Why by hand: where base and adapter differ in dtype, under autocast and with dropout, autograd would save copies of x
for each target (a float32 one, the dropped one, the mask), and for DoRA four tensors of the output's size. Here one
node saves x itself (shared by every layer that reads it), h (tokens, r), and for DoRA z. Where all is one dtype,
torch's own operations save no more and are faster on few tokens; see ``functional.adapted_linear``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.update.update import row_scale

# Where base and adapter differ in dtype, the work goes through blocks of rows, so that no float32 copy of a whole
# (tokens, in) or (tokens, out) tensor is ever made. The dropout mask is drawn in the same blocks in both passes.
_BLOCK_ROWS = 2048

_Factors = tuple[Tensor, Tensor, Tensor | None, Tensor | float]  # A, B, M, sigma


class AdaptedLinear(torch.autograd.Function):
    """y = c z + b with z = x W^T + u B^T, u = sigma k, k = h M^T, h = x_d A^T, x_d = mask * x / (1 - p).

    sigma = s g; c = m / norm, or 1 without a magnitude; norm is a constant. W, b, M, g and m may be missing; without W
    the caller gives base_out = x W^T + b, whatever computed it.

    Let G = dL/dy (tokens, out) and Z = dL/dz = G c. Then

        dL/dbase_out = Z                            dL/dW = Z^T x
        dL/dm = colsum(G * z) / norm                dL/db = colsum(G), less colsum(Z) if base_out carries b's share
        T = Z B (tokens, r)                         dL/dB = Z^T u
        dL/dg = s sum(T * k)                        dL/dk = T sigma
        dL/dM = (dL/dk)^T h                         dL/dh = (dL/dk) M
        dL/dA = (dL/dh)^T x_d                       dL/dx = Z W + mask * ((dL/dh) A) / (1 - p)

    Nothing of size (tokens, out) is saved without a magnitude, z with one. The dropout mask is not saved but drawn
    again from its seed, which comes from torch's generator, so that checkpointing restores it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        M: Tensor | None,
        gate: Tensor | None,
        scaling: float,
        dropout: float,
        base_out: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
    ) -> Tensor:
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = autocast or A.dtype
        z: Tensor
        if base_out is not None:
            z = base_out.clone() if bias is None or magnitude is None else base_out - bias.to(base_out.dtype)
        elif autocast is None:
            z = F.linear(x, cast(Tensor, W), bias if magnitude is None else None)
        else:
            z = F.linear(x.to(autocast), _to(W, autocast), _cast(bias if magnitude is None else None, autocast))

        seed = int(torch.randint(2**62, ()).item()) if dropout else 0
        factors = _factors(A, B, M, gate, scaling, dtype)
        mask = _masks(seed, dropout, x.device, dtype) if dropout else None
        c = None if magnitude is None or norm is None else row_scale(magnitude, norm)
        if z.dtype == dtype == x.dtype or x.shape[0] <= _BLOCK_ROWS:
            h, y = _add_update(z, x, factors, mask, c, bias)
        else:
            blocks = zip(z.split(_BLOCK_ROWS), x.split(_BLOCK_ROWS), strict=True)
            h, y = map(torch.cat, zip(*(_add_update(*b, factors, mask, c, bias) for b in blocks), strict=True))

        ctx.scaling, ctx.dropout, ctx.seed, ctx.dtype = scaling, dropout, seed, dtype
        ctx.has_base_out = base_out is not None
        dora = () if c is None else (z, bias, magnitude, norm)
        ctx.save_for_backward(x, h, A, B, M, gate, W, *dora)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if torch.is_autocast_enabled(grad.device.type):  # dtypes are settled here, as they were in forward
            with torch.autocast(grad.device.type, enabled=False):
                return _backward(ctx, grad)
        return _backward(ctx, grad)


def _backward(ctx: Any, g: Tensor) -> tuple:
    x, h, A, B, M, gate, W, *dora = ctx.saved_tensors
    dtype = ctx.dtype
    needs_x, needs_A, needs_B, needs_M, needs_gate, _, _, needs_out, needs_W, needs_bias, needs_m, _ = (
        ctx.needs_input_grad
    )
    grad_bias: Any = g.sum(0, dtype=_accumulator(g.dtype)) if needs_bias else None
    grad_m: Any = None
    if dora:
        z, bias, magnitude, norm = dora
        c = row_scale(magnitude, norm)
        product = g * z if g.dtype == c.dtype else g.to(c.dtype) * z
        grad_m = row_scale(product.sum(0), norm).to(magnitude.dtype)
        if needs_bias:
            grad_bias = grad_bias * (1 - c) if ctx.has_base_out else grad_bias
            grad_bias = grad_bias.to(bias.dtype)
        g = torch.mul(g, c, out=product).to(g.dtype)
    elif needs_bias and ctx.has_base_out:
        grad_bias = None  # without a magnitude the whole of it passes through base_out

    dx: Any = None
    if needs_x:
        dx = torch.zeros_like(x, dtype=g.dtype) if W is None else g @ _to(W, g.dtype)
    needs = needs_A, needs_B, needs_M, needs_gate
    factors = _factors(A, B, M, gate, ctx.scaling, dtype)
    mask = _masks(ctx.seed, ctx.dropout, x.device, dtype) if ctx.dropout else None
    if g.dtype == dtype == x.dtype or x.shape[0] <= _BLOCK_ROWS:
        sums = _add_gradient(dx, g, x, h, factors, mask, needs)
    else:
        pieces = [t.split(_BLOCK_ROWS) for t in (g if dx is None else dx, g, x, h)]
        blocks = [
            _add_gradient(None if dx is None else dxs, gs, xs, hs, factors, mask, needs)
            for dxs, gs, xs, hs in zip(*pieces, strict=True)
        ]
        sums = _Sums(
            *(None if s[0] is None else torch.stack([_up(t) for t in s]).sum(0) for s in zip(*blocks, strict=True))
        )
    return (
        _to(dx, x.dtype) if needs_x else None,
        _cast(sums.A, A.dtype),
        _cast(sums.B, B.dtype),
        None if sums.M is None else _to(sums.M, M.dtype),
        None if sums.sigma is None else (sums.sigma * ctx.scaling).sum_to_size(gate.shape).to(gate.dtype),
        None,
        None,
        g if needs_out else None,
        (g.t() @ x.to(g.dtype)).to(W.dtype) if needs_W else None,
        grad_bias,
        grad_m if needs_m else None,
        None,
    )


def _add_update(
    z: Tensor, x: Tensor, factors: _Factors, mask: Any, c: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Adds u B^T to z (tokens, out) in place; returns h (tokens, r) and y = c z + bias, which is z without c."""
    A, B, M, sigma = factors
    x = _to(x, A.dtype)
    h = (x if mask is None else x * mask(x)) @ A.t()
    u = (h if M is None else h @ M.t()) * sigma
    if z.dtype == u.dtype:
        exact = z.addmm_(u, B.t())
    else:  # y is rounded once, not z first and then its multiple
        exact = z + u @ B.t()
        z.copy_(exact)
    if c is None:
        return h, z
    if bias is None:
        return h, (exact * c).to(z.dtype)
    if exact.dtype == c.dtype == bias.dtype:
        return h, torch.addcmul(bias, exact, c).to(z.dtype)
    return h, (exact * c + bias).to(z.dtype)


class _Sums(NamedTuple):
    """Gradients that are sums over tokens; those not asked for are None."""

    A: Tensor | None
    B: Tensor | None
    M: Tensor | None
    sigma: Tensor | None


def _add_gradient(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    h: Tensor,
    factors: _Factors,
    mask: Any,
    needs: tuple[bool, ...],
) -> _Sums:
    """Adds the low-rank path's share to dx (tokens, in) in place and returns the sums; g is Z."""
    A, B, M, sigma = factors
    needs_A, needs_B, needs_M, needs_gate = needs
    g, x = _to(g, A.dtype), _to(x, A.dtype)
    k = h if M is None else h @ M.t()
    t = g @ B
    sum_sigma = (t * k).sum(0, dtype=_accumulator(t.dtype)) if needs_gate else None
    sum_B = None
    if needs_B:  # two ways to write Z^T u: the second is faster where tokens are many, but comes out transposed
        u = k * sigma
        sum_B = g.t() @ u if g.shape[0] <= 128 else (u.t() @ g).t()
    t *= sigma
    sum_M = t.t() @ h if needs_M else None
    if M is not None:
        t = t @ M
    factor = None if mask is None else mask(x)
    sum_A = t.t() @ (x if factor is None else x * factor) if needs_A else None
    if dx is not None:
        if factor is not None:
            dx.add_((t @ A).mul_(factor))
        elif dx.dtype == t.dtype:
            dx.addmm_(t, A)
        else:
            dx.add_(t @ A)
    return _Sums(sum_A, sum_B, sum_M, sum_sigma)


def _factors(
    A: Tensor, B: Tensor, M: Tensor | None, gate: Tensor | None, scaling: float, dtype: torch.dtype
) -> _Factors:
    """A, B, M and sigma in the dtype of computation."""
    sigma = scaling if gate is None else (gate * scaling).to(dtype)
    return _to(A, dtype), _to(B, dtype), _cast(M, dtype), sigma


def _to(tensor: Any, dtype: torch.dtype) -> Tensor:
    # Tensor.to would find out the same, but in a microsecond, which counts where a layer takes a millisecond.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _to(tensor, dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _up(tensor: Tensor) -> Tensor:
    return tensor.to(_accumulator(tensor.dtype))


def _masks(seed: int, p: float, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function that draws inverted dropout's factors, 0 or 1 / (1 - p), block after block."""
    random = torch.Generator(device).manual_seed(seed)
    return lambda x: torch.empty_like(x, dtype=dtype).bernoulli_(1.0 - p, generator=random).div_(1.0 - p)
