"""DoRA's last step ``y = c (z - b) + b``, c = m / norm: with torch's operations, and as one autograd node."""

from typing import Any

import torch
from torch import Tensor

from loraloom.update.node import AdaptedLinear
from loraloom.update.terms import compute_dtype
from loraloom.update.update import row_scale

# y - b is off by |b| units in the last place. Where a row's bias is larger than so many m, z is kept.
_MOST_BIAS = 16.0


def rescale(z: Tensor, c: Tensor, bias: Tensor | None, channel_dim: int = -1) -> Tensor:
    """DoRA's last step, ``c (z - bias) + bias`` along one dimension of z; differentiable."""
    shape = [1] * z.dim()
    shape[channel_dim] = -1
    if bias is None:
        return c.view(shape) * z
    return c.view(shape) * (z - bias.view(shape)) + bias.view(shape)


class Rescaled(torch.autograd.Function):
    """DoRA's y = c z + b from z = x W^T + u B^T, c = m / norm; the norm is a constant.

    Let G = dL/dy. Then dL/dz = G c, dL/db = colsum(G), and

        dL/dm = colsum(G * z) / norm = colsum(G * (y - b)) / m.

    So y is saved in place of z, whose memory becomes y's, where y tells z (see :func:`_tells`). If y has been changed
    in place, as ReLU(inplace=True) does, z is computed again by the node that made it.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, again: bool) -> Tensor:
        """``again``: z comes from an AdaptedLinear with a W, which can make it again."""
        c = row_scale(magnitude, norm)
        ctx.keeps_output = again and _tells(z, magnitude, bias)
        if not ctx.keeps_output:
            ctx.save_for_backward(z, magnitude, bias, c, norm)
            if bias is None:
                return torch.mul(z, c, out=torch.empty_like(z))
            return torch.addcmul(bias, z, c, out=torch.empty_like(z))
        y = z.mul_(c) if bias is None else torch.addcmul(bias, z, c, out=z)
        ctx.constants, ctx.version = (magnitude, bias, c), magnitude._version
        ctx.save_for_backward(y, magnitude, bias, c)
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        is_output, maker = ctx.keeps_output, ctx.next_functions[0][0]
        norm: list[Tensor] = []
        try:
            saved, magnitude, bias, c, *norm = ctx.saved_tensors
        except RuntimeError:  # something saved has been changed in place
            if not is_output or maker is None or ctx.constants[0]._version != ctx.version:
                raise
            magnitude, bias, c = ctx.constants
            saved, is_output = AdaptedLinear.again(maker), False
        needs_z, needs_m, _, needs_bias, _ = ctx.needs_input_grad
        grad_bias = g.sum(0, dtype=compute_dtype(g)) if needs_bias else None
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            z = AdaptedLinear.again(maker) if is_output else saved
            inverse = row_scale(torch.ones_like(c), norm[0]) if norm else _quotient(c, magnitude).detach()
            return g * (magnitude * inverse), (g * z).sum(0) * inverse, None, grad_bias, None
        grad_m = dz = None
        if needs_m:
            product = g * saved if bias is None or not is_output else (saved - bias).mul_(g)
            sums = product.sum(0, dtype=compute_dtype(g))
            sums = sums if norm or is_output else sums.mul_(c)
            grad_m = (row_scale(sums, norm[0]) if norm else _quotient(sums, magnitude)).to(magnitude.dtype)
        if needs_z:
            dz = torch.mul(g, c, out=torch.empty_like(g) if grad_m is None else product)
        return dz, grad_m, None, grad_bias, None


def _tells(z: Tensor, magnitude: Tensor, bias: Tensor | None) -> bool:
    """Whether z follows from y.

    Not where m is 0, nor with digits left where it is small beside b. To look waits for an accelerator: there z is
    kept beside a bias, and without one the gradient of an m that is 0 is 0.
    """
    if z.device.type != "cpu":
        return bias is None
    if bias is None:
        return bool(magnitude.all())
    return z.dtype.itemsize >= 4 and torch.linalg.vector_norm(bias / magnitude, torch.inf).item() <= _MOST_BIAS


def _quotient(a: Tensor, magnitude: Tensor) -> Tensor:
    """``a / m``, and 0 where m is 0, which it is not on the CPU."""
    return a / magnitude if a.device.type == "cpu" else a / magnitude.masked_fill(magnitude == 0, torch.inf)
