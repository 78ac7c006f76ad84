"""An adapted linear layer as one autograd node: forward, and the gradients derived by hand.

Why by hand: where base and adapter differ in dtype, under autocast and with dropout, autograd would save copies of x
for each target (a float32 one, the dropped one, the mask). Here one node saves x itself (shared by every layer that
reads it) and h (tokens, r). Where all is one dtype, torch's own operations save no more and are faster on few tokens;
see ``linear.adapted_linear``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.update import split
from loraloom.update.low_rank_path import (
    Factors,
    Sums,
    accumulator,
    add_gradient,
    add_update,
    as_dtype,
    as_dtype_or_none,
    factors_in,
    up,
)
from loraloom.update.terms import autocast_dtype

# Where base and adapter differ in dtype and the device cannot split factors (see split.py), the work goes through
# blocks of rows, so that no float32 copy of a whole (tokens, in) or (tokens, out) tensor is ever made. The dropout mask
# is drawn in the same blocks in both passes.
_BLOCK_ROWS = 2048


class LinearMap(NamedTuple):
    """A base layer whose weight is stored in another form, such as 4-bit.

    Attributes:
        apply: ``x W^T + b`` in memory that is nobody else's, for x (tokens, in).
        matrix: W (out, in), made once in each backward pass, for the gradient of x.
    """

    apply: Callable[[Tensor], Tensor]
    matrix: Callable[[], Tensor]


Weight = Tensor | LinearMap


class AdaptedLinear(torch.autograd.Function):
    """z = x W^T + b + u B^T with u = sigma k, k = h M^T, h = x_d A^T, x_d = mask * x / (1 - p).

    sigma = s g. M, g and b may be missing. W is a tensor, or a LinearMap, to which b is given for its gradient alone.
    Without W the caller gives base_out = x W^T + b, whatever computed it.

    Let G = dL/dz (tokens, out). Then

        dL/dbase_out = G                            dL/dW = G^T x,  dL/db = colsum(G)
        T = G B (tokens, r)                         dL/dB = G^T u
        dL/dg = s sum(T * k)                        dL/dk = T sigma
        dL/dM = (dL/dk)^T h                         dL/dh = (dL/dk) M
        dL/dA = (dL/dh)^T x_d                       dL/dx = G W + mask * ((dL/dh) A) / (1 - p)

    Nothing of size (tokens, out) is saved. The dropout mask is not saved but drawn again from its seed, which comes
    from torch's generator, so that checkpointing restores it; in a CUDA graph it is saved, one byte an entry.
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
        W: Weight | None,
        bias: Tensor | None,
    ) -> Tensor:
        autocast = autocast_dtype(x.device.type)
        ctx.scaling, ctx.dropout = scaling, dropout
        kept = _draw(x, dropout) if dropout and _capturing(x.device) else None
        ctx.seed = int(torch.randint(2**62, ()).item()) if dropout and kept is None else 0
        ctx.base_dtype, ctx.dtype = autocast or x.dtype, autocast or A.dtype
        ctx.map = W if isinstance(W, LinearMap) else None
        z, *saved = _output(ctx, x, A, B, M, gate, base_out, W, bias, kept)
        ctx.save_for_backward(x, A, B, M, gate, W if isinstance(W, Tensor) else None, kept, *saved)
        return cast(Tensor, z)

    @staticmethod
    def again(node: Any) -> Tensor:
        """The output without the bias, from what a node with a W has saved; differentiable where gradients are on."""
        if torch.is_grad_enabled():
            return _recomputed(node)
        x, A, B, M, gate, W, kept, *_ = node.saved_tensors
        return cast(Tensor, _output(node, x, A, B, M, gate, None, node.map if W is None else W, None, kept)[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            return _differentiable(ctx, grad)
        if autocast_dtype(grad.device.type) is None:
            return _backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):  # dtypes are settled here, as they were in forward
            return _backward(ctx, grad)


def _output(
    ctx: Any,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    M: Tensor | None,
    gate: Tensor | None,
    base_out: Tensor | None,
    W: Weight | None,
    bias: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """z, and what backward needs besides the inputs: h, or h1, A1 and B1 where factors are split."""
    fresh = base_out is None
    z = _base(ctx, x, cast(Weight, W), bias) if base_out is None else base_out
    alike = x.dtype is z.dtype and A.dtype is B.dtype is ctx.dtype is torch.float32
    ctx.split = alike and M is None and gate is None and not ctx.dropout and split.supported(x.device, x.dtype)
    if ctx.split:
        As, Bs, r = split.split_rows(A), split.split_columns(B), len(A)
        h = split.split_hidden(split.product(x, As.t()), r)
        y = z.addmm_(h, Bs.t(), alpha=ctx.scaling) if fresh else torch.addmm(z, h, Bs.t(), alpha=ctx.scaling)
        if As.numel() + Bs.numel() > x.numel():  # not worth keeping
            return y, h[:, :r], None, None
        return y, h[:, :r], As[:r], Bs[:, :r]
    factors = factors_in(A, B, M, gate, ctx.scaling, ctx.dtype)
    mask = _masks(ctx, x.device, kept) if ctx.dropout else None
    ctx.rows = x.shape[0] if z.dtype == ctx.dtype == x.dtype else _BLOCK_ROWS
    if x.shape[0] <= ctx.rows:
        return add_update(z, x, factors, mask, fresh)
    y = z if fresh else torch.empty_like(z)
    hidden = []
    for y_rows, z_rows, x_rows in zip(*(t.split(ctx.rows) for t in (y, z, x)), strict=True):
        rows, h_rows = add_update(z_rows, x_rows, factors, mask, fresh)
        hidden.append(h_rows)
        if not fresh:
            y_rows.copy_(rows)
    return y, torch.cat(hidden)


def _base(ctx: Any, x: Tensor, W: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(W, LinearMap):
        return W.apply(x)
    return F.linear(as_dtype(x, ctx.base_dtype), as_dtype(W, ctx.base_dtype), as_dtype_or_none(bias, ctx.base_dtype))


def _backward(ctx: Any, g: Tensor) -> tuple:
    x, A, B, M, gate, W, kept, h, *parts = ctx.saved_tensors
    dtype = ctx.dtype
    needs_x, needs_A, needs_B, needs_M, needs_gate, _, _, needs_out, needs_W, needs_bias = ctx.needs_input_grad
    weight = ctx.map.matrix() if needs_x and ctx.map is not None else W
    dx: Any = g @ as_dtype(weight, g.dtype) if needs_x and weight is not None else None
    needs = needs_x, needs_A, needs_B, needs_M, needs_gate
    if ctx.split:
        dx, sums = _split_gradient(dx, g, x, h, A, B, parts, ctx.scaling, needs)
    else:
        factors = factors_in(A, B, M, gate, ctx.scaling, dtype)
        mask = _masks(ctx, x.device, kept) if ctx.dropout else None
        if x.shape[0] <= ctx.rows:
            dx, sums = add_gradient(dx, g, x, h, factors, mask, needs)
        else:
            dx, sums = _in_blocks(dx, g, x, h, factors, mask, needs, ctx.rows)
    return (
        as_dtype(dx, x.dtype) if needs_x else None,
        as_dtype_or_none(sums.A, A.dtype),
        as_dtype_or_none(sums.B, B.dtype),
        None if sums.M is None or M is None else as_dtype(sums.M, M.dtype),
        None if sums.sigma is None else (sums.sigma * ctx.scaling).sum_to_size(gate.shape).to(gate.dtype),
        None,
        None,
        g if needs_out else None,
        (g.t() @ x.to(g.dtype)).to(W.dtype) if needs_W else None,
        g.sum(0, dtype=accumulator(g.dtype)) if needs_bias else None,
    )


def _recomputed(ctx: Any) -> Tensor:
    """z without bias and base_out, by operations that autograd follows."""
    x, A, B, M, gate, W, kept, *_ = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        A, B, M, sigma = factors_in(A, B, M, gate, ctx.scaling, ctx.dtype)
        h = as_dtype(x, ctx.dtype)
        if ctx.dropout:
            mask = _masks(ctx, x.device, kept)
            h = h * torch.cat([mask(rows) for rows in x.detach().split(ctx.rows)])
        h = h @ A.t()
        update = ((h if M is None else h @ M.t()) * sigma) @ B.t()
        weight = W if ctx.map is None else ctx.map.matrix()
        return update if weight is None else as_dtype(x, ctx.base_dtype) @ as_dtype(weight, ctx.base_dtype).t() + update


def _differentiable(ctx: Any, g: Tensor) -> tuple:
    """As _backward, by operations that autograd follows; the speed of it does not matter."""
    x, A, B, M, gate, W, *_ = ctx.saved_tensors
    inputs = dict(zip((0, 1, 2, 3, 4, 8), (x, A, B, M, gate, W), strict=True))
    grads: list[Tensor | None] = [None] * 10
    wanted = [i for i in inputs if ctx.needs_input_grad[i]]
    if wanted:
        z = _recomputed(ctx)
        found = torch.autograd.grad(z, [inputs[i] for i in wanted], g.to(z.dtype), create_graph=True)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
    grads[7] = g if ctx.needs_input_grad[7] else None
    grads[9] = g.sum(0) if ctx.needs_input_grad[9] else None
    return tuple(grads)


def _split_gradient(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    parts: list[Tensor | None],
    s: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Sums]:
    """As add_gradient, of bfloat16 parts; parts are A1 and B1, or None."""
    needs_x, needs_A, needs_B, _, _ = needs
    A1, B1 = (factor.to(g.dtype) if part is None else part for part, factor in zip(parts, (A, B), strict=True))
    sum_B = split.product(g.t(), h, s) if needs_B else None
    if not (needs_x or needs_A):
        return None, Sums(None, sum_B)
    t = g @ B1
    sum_A = split.product(t.t(), x, s) if needs_A else None
    if needs_x:
        dx = (t @ A1).mul_(s) if dx is None else dx.addmm_(t, A1, alpha=s)
    return dx, Sums(sum_A, sum_B)


def _in_blocks(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    h: Tensor,
    factors: Factors,
    mask: Any,
    needs: tuple[bool, ...],
    rows: int,
) -> tuple[Tensor | None, Sums]:
    """As add_gradient, with copies in the dtype of computation of a few rows at a time."""
    given = dx is not None
    if needs[0] and dx is None:
        dx = torch.empty_like(x, dtype=g.dtype)
    total: list[Tensor | None] = [None] * len(Sums._fields)
    pieces = [t.split(rows) for t in (g if dx is None else dx, g, x, h)]
    for dx_block, g_block, x_block, h_block in zip(*pieces, strict=True):
        share, sums = add_gradient(dx_block if given else None, g_block, x_block, h_block, factors, mask, needs)
        if share is not None and not given:
            dx_block.copy_(share)
        for i, value in enumerate(sums):
            if value is not None:
                total[i] = up(value) if total[i] is None else total[i].add_(value)  # type: ignore[union-attr]
    return dx, Sums(*total)


def _masks(ctx: Any, device: torch.device, kept: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that gives inverted dropout's factors, 0 or 1 / (1 - p), block of rows after block."""
    keep, dtype = 1.0 - ctx.dropout, ctx.dtype
    if kept is None:
        random = torch.Generator(device).manual_seed(ctx.seed)
        return lambda x: torch.empty_like(x, dtype=dtype).bernoulli_(keep, generator=random).div_(keep)
    start = 0

    def following(x: Tensor) -> Tensor:
        nonlocal start
        start += len(x)
        return kept[start - len(x) : start].to(dtype).div_(keep)

    return following


def _draw(x: Tensor, p: float) -> Tensor:
    """Which entries dropout keeps, by torch's own generator of the device, which a CUDA graph advances."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. A seed drawn on the host would be the same in every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
