"""DoRA's last step ``y = c (z - b) + b``, c = m / norm: with torch's operations, and as one autograd node."""

from typing import Any

import torch
from torch import Tensor

from loraloom.update.node import AdaptedLinear
from loraloom.update.terms import compute_dtype
from loraloom.update.update import row_scale


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

        dL/dm = colsum(G * z) / norm, without a bias colsum(G * y) / m.

    So without a bias y is saved in place of z, whose memory becomes y's. Where m is 0, y does not tell z: on the CPU z
    is kept if there is such an m; elsewhere looking would wait for the device, and the gradient of that m is 0. If y
    has been changed in place, as ReLU(inplace=True) does, z is computed again by the node that made it.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, again: bool) -> Tensor:
        """``again``: z comes from an AdaptedLinear with a W, which can make it again."""
        c = row_scale(magnitude, norm)
        ctx.keeps_output = again and bias is None and not (z.device.type == "cpu" and not magnitude.all())
        ctx.constants, ctx.version = (magnitude.detach(), norm, c), magnitude._version
        if ctx.keeps_output:
            ctx.save_for_backward(z.mul_(c), magnitude, norm, c)
            ctx.mark_dirty(z)
            return z
        ctx.save_for_backward(z, magnitude, norm, c)
        if bias is None:
            return torch.mul(z, c, out=torch.empty_like(z))
        return torch.addcmul(bias, z, c, out=torch.empty_like(z))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        is_output = ctx.keeps_output
        try:
            saved, magnitude, norm, c = ctx.saved_tensors
        except RuntimeError:  # something saved has been changed in place
            maker = ctx.next_functions[0][0]
            magnitude, norm, c = ctx.constants
            if torch.is_grad_enabled() or not is_output or maker is None or magnitude._version != ctx.version:
                raise
            saved, is_output = AdaptedLinear.again(maker), False
        needs_z, needs_m, _, needs_bias, _ = ctx.needs_input_grad
        grad_m = dz = None
        if torch.is_grad_enabled():  # create_graph=True: by operations that can be differentiated again
            c = row_scale(magnitude, norm)
            z = saved / c.masked_fill(c == 0, 1) if is_output else saved
            grad_m = row_scale((g * z).sum(0, dtype=compute_dtype(g)), norm).to(magnitude.dtype) if needs_m else None
            dz = (g * c).to(z.dtype) if needs_z else None
        elif needs_m:
            product = g * saved
            sums = product.sum(0, dtype=compute_dtype(g))
            grad_m = row_scale(sums, magnitude if is_output else norm).to(magnitude.dtype)
        if needs_z and dz is None:
            dz = torch.mul(g, c, out=torch.empty_like(g) if grad_m is None else product)
        return dz, grad_m, None, g.sum(0, dtype=compute_dtype(g)) if needs_bias else None, None
