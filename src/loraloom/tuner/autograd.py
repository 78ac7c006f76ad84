"""A linear layer's adapter as one autograd node: forward, and the gradients derived by hand.

Why by hand: autograd would save a float32 copy of x for each target, the scaled h, and for DoRA four tensors of the
output's size. Here one node saves x itself (shared by every layer that reads it), h (tokens, r), and for DoRA z.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Where base and adapter differ in dtype, the work goes through blocks of rows, so that no float32 copy of a whole
# (tokens, in) or (tokens, out) tensor is ever made. The dropout mask is drawn in the same blocks in both passes.
_BLOCK_ROWS = 2048


class AdaptedLinear(torch.autograd.Function):
    """y = c (z - b) + b with z = base_out + u B^T, u = sigma * k, k = h M^T, h = x_d A^T, x_d = mask * x / (1 - p).

    sigma = s g; c = m / norm (c = 1 without a magnitude, then y = z); norm is a constant.

    Let G = dL/dy (tokens, out) and Z = dL/dz = G c. Then

        dL/dbase_out = Z
        dL/dm = colsum(G * (z - b)) / norm          dL/db = colsum(G) (1 - c)
        T = Z B (tokens, r)                         dL/dB = Z^T u
        dL/dg = s sum(T * k)                        dL/dk = T sigma
        dL/dM = (dL/dk)^T h                         dL/dh = (dL/dk) M
        dL/dA = (dL/dh)^T x_d                       dL/dx = mask * ((dL/dh) A) / (1 - p)

    Nothing of size (tokens, out) is saved without a magnitude, z with one. The dropout mask is not saved but drawn
    again from its seed, which comes from torch's generator, so that checkpointing restores it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        M: Tensor | None,
        gate: Tensor | None,
        scaling: float,
        magnitude: Tensor | None,
        norm: Tensor | None,
        bias: Tensor | None,
        dropout: float,
        in_place: bool,
    ) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else A.dtype
        a, b, m = A.to(dtype), B.to(dtype), None if M is None else M.to(dtype)
        sigma = scaling if gate is None else (gate * scaling).to(dtype)
        seed = int(torch.randint(2**62, ()).item()) if dropout else 0

        z = base_out if in_place else base_out.clone()
        h = torch.empty(x.shape[0], A.shape[0], dtype=dtype, device=x.device)
        generator = _generator(seed, dropout, x)
        for rows in _blocks(x.shape[0], dtype == x.dtype == z.dtype):
            xd = x[rows].to(dtype)
            if dropout:
                xd = xd * _mask(xd, dropout, generator)
            torch.mm(xd, a.t(), out=h[rows])
            k = h[rows] if m is None else h[rows] @ m.t()
            u = k * sigma
            if z.dtype == dtype:
                z[rows].addmm_(u, b.t())
            else:
                z[rows].add_(u @ b.t())

        ctx.settings = scaling, dropout, seed, dtype
        if magnitude is None or norm is None:
            ctx.save_for_backward(x, h, A, B, M, gate)
            if in_place:
                ctx.mark_dirty(base_out)
            return z
        ctx.save_for_backward(x, h, A, B, M, gate, z, magnitude, norm, bias)
        return _rescale(z, magnitude / norm, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, h, A, B, M, gate, *dora = ctx.saved_tensors
        z, magnitude, norm, bias = cast(Any, dora or (None, None, None, None))
        scaling, dropout, seed, dtype = ctx.settings
        needs_out, needs_x, needs_A, needs_B, needs_M, needs_gate, _, needs_m, _, needs_bias, *_ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            a, b, m = A.to(dtype), B.to(dtype), None if M is None else M.to(dtype)
            sigma = scaling if gate is None else (gate * scaling).to(dtype)
            c: Any = None if magnitude is None else magnitude / norm
            grad_out = grad if c is None else torch.empty_like(grad)
            grad_x: Any = torch.empty_like(x) if needs_x else None
            sums: dict[str, Tensor] = {}
            generator = _generator(seed, dropout, x)
            for rows in _blocks(x.shape[0], dtype == x.dtype == grad.dtype):
                g = grad[rows].to(dtype)
                if c is not None:
                    product = g * z[rows]
                    _add(sums, "c", product.sum(0, dtype=c.dtype))
                    if bias is not None:
                        _add(sums, "grad", g.sum(0, dtype=c.dtype))
                    g = torch.mul(g, c, out=product) if product.dtype == c.dtype else (g * c).to(dtype)
                    grad_out[rows] = g
                hr = h[rows]
                k = hr if m is None else hr @ m.t()
                t = g @ b
                if needs_B:
                    _add(sums, "B", ((k * sigma).t() @ g).to(B.dtype))
                if needs_gate:
                    _add(sums, "gate", (t * k).sum(0, dtype=gate.dtype))
                t *= sigma
                if needs_M:
                    _add(sums, "M", (t.t() @ hr).to(M.dtype))
                if m is not None:
                    t = t @ m
                mask = _mask(x[rows], dropout, generator, dtype) if dropout else None
                if needs_A:
                    xd = x[rows].to(dtype)
                    _add(sums, "A", (t.t() @ (xd if mask is None else xd * mask)).to(A.dtype))
                if needs_x:
                    dx = t @ a
                    grad_x[rows] = dx if mask is None else dx * mask
            grad_gate = grad_m = grad_bias = None
            if needs_gate:
                grad_gate = (sums["gate"] * scaling).sum_to_size(gate.shape)
            if c is not None:
                offset = 0 if bias is None else bias * sums["grad"]
                grad_m = ((sums["c"] - offset) / norm).to(magnitude.dtype) if needs_m else None
                grad_bias = (sums["grad"] * (1 - c)).to(bias.dtype) if needs_bias else None
            return (
                grad_out if needs_out else None,
                grad_x,
                sums.get("A"),
                sums["B"].t() if needs_B else None,
                sums.get("M"),
                grad_gate,
                None,
                grad_m,
                None,
                grad_bias,
                None,
                None,
            )


def _blocks(rows: int, whole: bool) -> list[slice]:
    if whole or rows <= _BLOCK_ROWS:
        return [slice(0, rows)]
    return [slice(start, min(start + _BLOCK_ROWS, rows)) for start in range(0, rows, _BLOCK_ROWS)]


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value


def _generator(seed: int, dropout: float, x: Tensor) -> torch.Generator | None:
    return torch.Generator(x.device).manual_seed(seed) if dropout else None


def _mask(x: Tensor, p: float, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
    """Inverted dropout's factor, 0 or 1 / (1 - p), of the shape of x."""
    return torch.empty_like(x, dtype=dtype or x.dtype).bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def _rescale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """c (z - bias) + bias in the dtype of z, as c z + (1 - c) bias: one pass and no temporary of z's size."""
    if bias is None:
        return torch.mul(z, c, out=torch.empty_like(z))
    offset = bias * (1 - c)
    if z.dtype == c.dtype:
        return torch.addcmul(offset, z, c)
    y = torch.empty_like(z)
    for rows in _blocks(z.shape[0], whole=False):
        y[rows] = z[rows] * c + offset
    return y
