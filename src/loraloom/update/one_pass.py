"""DoRA on few tokens: the layer's output and ``W A^T``, which the norm needs, from one pass over W.

    [x; A] W^T = [x W^T; (W A^T)^T]

With few tokens a layer's time goes into reading W, and a product of W with a thin matrix takes a third of one with x.
Where the norm is known, the same node does without: gradient checkpointing computes a layer a second time, when the
norm is known, and must find the same tensors saved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraloom.update.low_rank_path import add_gradient
from loraloom.update.update import row_scale

MakeNorm = Callable[[Tensor | None], Tensor]


class OnePass(torch.autograd.Function):
    """y = c (x W^T + s h B^T) + b with h = x A^T, c = m / norm, all of one dtype; the norm is a constant.

    Let G = dL/dy and C = G c = dL/dz with y = c z + b. Then dL/dm = colsum(G * z) / norm, dL/db = colsum(G), the other
    gradients are those of `loraloom.update.node.AdaptedLinear` with C in place of G.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        W: Tensor,
        bias: Tensor | None,
        magnitude: Tensor,
        norm: Tensor | MakeNorm,
    ) -> Tensor:
        h = x @ A.t()
        if isinstance(norm, Tensor):
            z = x @ W.t()
        else:
            both = torch.cat([x, A]) @ W.t()
            z, norm = both[: len(x)], norm(both[len(x) :].t())
        z.addmm_(h, B.t(), alpha=scaling)
        c = row_scale(magnitude, norm)
        ctx.scaling = scaling
        ctx.save_for_backward(x, A, B, W, bias, magnitude, norm, c, h, z)
        return z * c if bias is None else torch.addcmul(bias, z, c)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, A, B, W, bias, magnitude, norm, c, h, z = ctx.saved_tensors
        needs_x, needs_A, needs_B, _, needs_W, needs_bias, needs_m, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            z = x @ W.t() + ctx.scaling * ((x @ A.t()) @ B.t())
            c = row_scale(magnitude, norm)
            y = z * c if bias is None else torch.addcmul(bias, z, c)
            inputs = dict(zip((0, 1, 2, 4, 5, 6), (x, A, B, W, bias, magnitude), strict=True))
            wanted = [i for i in inputs if ctx.needs_input_grad[i]]
            found = torch.autograd.grad(y, [inputs[i] for i in wanted], g, create_graph=True)
            grads = dict(zip(wanted, found, strict=True))
            return tuple(grads.get(i) for i in range(8))
        gz = g * c
        dx = gz @ W if needs_x else None
        factors = A, B, None, ctx.scaling
        dx, sums = add_gradient(dx, gz, x, h, factors, None, (needs_x, needs_A, needs_B, False, False))
        grad_m = row_scale((z * g).sum(0), norm) if needs_m else None
        return (
            dx,
            sums.A,
            sums.B,
            None,
            gz.t() @ x if needs_W else None,
            g.sum(0) if needs_bias else None,
            grad_m,
            None,
        )
