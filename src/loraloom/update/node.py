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

from loraloom.update import split, twice
from loraloom.update.terms import autocast_dtype

# Where base and adapter differ in dtype and the device cannot split factors (see split.py), the work goes through
# blocks of rows, so that no float32 copy of a whole (tokens, in) or (tokens, out) tensor is ever made. The dropout mask
# is drawn in the same blocks in both passes.
_BLOCK_ROWS = 2048

_Factors = tuple[Tensor, Tensor, Tensor | None, Tensor | float]  # A, B, M, sigma


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
        """The output without the bias, from what a node with a W has saved."""
        x, A, B, M, gate, W, kept, *_ = node.saved_tensors
        return cast(Tensor, _output(node, x, A, B, M, gate, None, node.map if W is None else W, None, kept)[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        backward = _backward_twice if torch.is_grad_enabled() else _backward  # create_graph=True
        if autocast_dtype(grad.device.type) is None:
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):  # dtypes are settled here, as they were in forward
            return backward(ctx, grad)


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
    factors = _factors(A, B, M, gate, ctx.scaling, ctx.dtype)
    mask = _masks(ctx, x.device, kept) if ctx.dropout else None
    if z.dtype == ctx.dtype == x.dtype or x.shape[0] <= _BLOCK_ROWS:
        return _add_update(z, x, factors, mask, fresh)
    y = z if fresh else torch.empty_like(z)
    hidden = []
    for y_rows, z_rows, x_rows in zip(*(t.split(_BLOCK_ROWS) for t in (y, z, x)), strict=True):
        rows, h_rows = _add_update(z_rows, x_rows, factors, mask, fresh)
        hidden.append(h_rows)
        if not fresh:
            y_rows.copy_(rows)
    return y, torch.cat(hidden)


def _base(ctx: Any, x: Tensor, W: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(W, LinearMap):
        return W.apply(x)
    return F.linear(_to(x, ctx.base_dtype), _to(W, ctx.base_dtype), _cast(bias, ctx.base_dtype))


def _backward(ctx: Any, g: Tensor) -> tuple:
    x, A, B, M, gate, W, kept, h, *parts = ctx.saved_tensors
    dtype = ctx.dtype
    needs_x, needs_A, needs_B, needs_M, needs_gate, _, _, needs_out, needs_W, needs_bias = ctx.needs_input_grad
    weight = ctx.map.matrix() if needs_x and ctx.map is not None else W
    dx: Any = g @ _to(weight, g.dtype) if needs_x and weight is not None else None
    needs = needs_x, needs_A, needs_B, needs_M, needs_gate
    if ctx.split:
        dx, sums = _split_gradient(dx, g, x, h, A, B, parts, ctx.scaling, needs)
    else:
        factors = _factors(A, B, M, gate, ctx.scaling, dtype)
        mask = _masks(ctx, x.device, kept) if ctx.dropout else None
        if g.dtype == dtype == x.dtype or x.shape[0] <= _BLOCK_ROWS:
            dx, sums = _add_gradient(dx, g, x, h, factors, mask, needs)
        else:
            dx, sums = _in_blocks(dx, g, x, h, factors, mask, needs)
    return (
        _to(dx, x.dtype) if needs_x else None,
        _cast(sums.A, A.dtype),
        _cast(sums.B, B.dtype),
        None if sums.M is None or M is None else _to(sums.M, M.dtype),
        None if sums.sigma is None else (sums.sigma * ctx.scaling).sum_to_size(gate.shape).to(gate.dtype),
        None,
        None,
        g if needs_out else None,
        (g.t() @ x.to(g.dtype)).to(W.dtype) if needs_W else None,
        g.sum(0, dtype=_accumulator(g.dtype)) if needs_bias else None,
    )


def _backward_twice(ctx: Any, g: Tensor) -> tuple:
    """As _backward, by operations that can be differentiated again."""
    x, A, B, M, gate, W, kept, *_ = ctx.saved_tensors
    needs_x, needs_A, needs_B, needs_M, needs_gate, _, _, needs_out, needs_W, needs_bias = ctx.needs_input_grad
    dropped = None
    if ctx.dropout:
        mask = _masks(ctx, x.device, kept)
        whole = g.dtype == ctx.dtype == x.dtype  # drawn as in the forward pass
        dropped = torch.cat([mask(rows) for rows in x.detach().split(len(x) if whole else _BLOCK_ROWS)])
    matrix = ctx.map.matrix() if ctx.map is not None else W
    found = twice.gradients(
        g,
        {"x": x, "A": A, "B": B, "M": M, "gate": gate, "W": matrix},
        {"x": needs_x, "A": needs_A, "B": needs_B, "M": needs_M, "gate": needs_gate, "W": needs_W},
        scaling=ctx.scaling,
        dropped=dropped,
        dtype=ctx.dtype,
    )
    factors = (found.get(name) for name in ("x", "A", "B", "M", "gate"))
    db = g.sum(0, dtype=_accumulator(g.dtype)) if needs_bias else None
    return *factors, None, None, g if needs_out else None, found.get("W"), db


def _add_update(z: Tensor, x: Tensor, factors: _Factors, mask: Any, fresh: bool) -> tuple[Tensor, Tensor]:
    """``z + u B^T`` (tokens, out), in z's memory if it is fresh, and h (tokens, r)."""
    A, B, M, sigma = factors
    x = _to(x, A.dtype)
    h = (x if mask is None else x * mask(x)) @ A.t()
    u = (h if M is None else h @ M.t()) * sigma
    if z.dtype == u.dtype:
        return z.addmm_(u, B.t()) if fresh else torch.addmm(z, u, B.t()), h
    update = u @ B.t()
    # In place where that keeps the base's precision: z is float32 beside bf16 factors too.
    exact = update.add_(z) if torch.promote_types(z.dtype, update.dtype) is update.dtype else update + z
    return z.copy_(exact) if fresh else exact.to(z.dtype), h


class _Sums(NamedTuple):
    """Gradients that are sums over tokens; those not asked for are None."""

    A: Tensor | None
    B: Tensor | None
    M: Tensor | None = None
    sigma: Tensor | None = None


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
) -> tuple[Tensor | None, _Sums]:
    """As _add_gradient, of bfloat16 parts; parts are A1 and B1, or None."""
    needs_x, needs_A, needs_B, _, _ = needs
    A1, B1 = (factor.to(g.dtype) if part is None else part for part, factor in zip(parts, (A, B), strict=True))
    sum_B = split.product(g.t(), h, s) if needs_B else None
    if not (needs_x or needs_A):
        return None, _Sums(None, sum_B)
    t = g @ B1
    sum_A = split.product(t.t(), x, s) if needs_A else None
    if needs_x:
        dx = (t @ A1).mul_(s) if dx is None else dx.addmm_(t, A1, alpha=s)
    return dx, _Sums(sum_A, sum_B)


def _add_gradient(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    h: Tensor,
    factors: _Factors,
    mask: Any,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, _Sums]:
    """dx (tokens, in) plus the low-rank path's share, in dx's memory if it is given, and the sums; g is G."""
    A, B, M, sigma = factors
    needs_x, needs_A, needs_B, needs_M, needs_gate = needs
    g, x = _to(g, A.dtype), _to(x, A.dtype)
    k = h if M is None else h @ M.t()
    t = g @ B
    sum_sigma = (t * k).sum(0, dtype=_accumulator(t.dtype)) if needs_gate else None
    sum_B = None
    if needs_B:  # two ways to write G^T u: the second is faster where tokens are many, but comes out transposed
        u = k * sigma
        sum_B = g.t() @ u if g.shape[0] <= 128 else (u.t() @ g).t()
    t *= sigma
    sum_M = t.t() @ h if needs_M else None
    if M is not None:
        t = t @ M
    factor = None if mask is None else mask(x)
    sum_A = t.t() @ (x if factor is None else x * factor) if needs_A else None
    if needs_x:
        if dx is not None and factor is None and dx.dtype == t.dtype:
            dx.addmm_(t, A)
        else:
            share = t @ A
            share = share if factor is None else share.mul_(factor)
            dx = share if dx is None else dx.add_(share)
    return dx, _Sums(sum_A, sum_B, sum_M, sum_sigma)


def _in_blocks(
    dx: Tensor | None, g: Tensor, x: Tensor, h: Tensor, factors: _Factors, mask: Any, needs: tuple[bool, ...]
) -> tuple[Tensor | None, _Sums]:
    """As _add_gradient, with copies in the dtype of computation of a few rows at a time."""
    given = dx is not None
    if needs[0] and dx is None:
        dx = torch.empty_like(x, dtype=g.dtype)
    total: list[Tensor | None] = [None] * len(_Sums._fields)
    pieces = [t.split(_BLOCK_ROWS) for t in (g if dx is None else dx, g, x, h)]
    for dx_block, g_block, x_block, h_block in zip(*pieces, strict=True):
        share, sums = _add_gradient(dx_block if given else None, g_block, x_block, h_block, factors, mask, needs)
        if share is not None and not given:
            dx_block.copy_(share)
        for i, value in enumerate(sums):
            if value is not None:
                total[i] = _up(value) if total[i] is None else total[i].add_(value)  # type: ignore[union-attr]
    return dx, _Sums(*total)


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
