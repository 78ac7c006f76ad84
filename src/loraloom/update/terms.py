"""The low-rank update as terms: ``D = sum_n g_n s_n B_n M_n A_n``.

Shapes: A (r, in), M (r, r), B (out, r), g (1,) or (r,), D (out, in). M and g are optional. Sources: LoRA 2106.09685,
MoSLoRA 2406.11909 (M), WeightLoRA 2506.02724 (g).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.update.traced import is_traced


class Term(NamedTuple):
    """One product ``g s B M A`` of the sum; the matrices of convolutions are flattened to two dimensions."""

    A: Tensor
    B: Tensor
    M: Tensor | None = None
    gate: Tensor | None = None
    scaling: float = 1.0


def scaling(r: int, alpha: float, use_rslora: bool = False) -> float:
    """``s = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA (2312.03732)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def alpha_of(scaling: float, r: int, use_rslora: bool = False) -> float:
    """The alpha that gives a scaling at a rank: the inverse of :func:`scaling`; an integer where it is one."""
    alpha = scaling * (math.sqrt(r) if use_rslora else r)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """At least float32: the dtype in which weights are combined (bf16 products would round away small updates)."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device, None where it is off."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> AbstractContextManager:
    """What is made of weights alone is computed in their dtype: autocast would round it for many batches to come.

    It also refuses to join float16 tensors where its own dtype is bfloat16.
    """
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def scale(term: Term) -> Tensor | float:
    """``g s``: a float, or with a gate a tensor of the gate's shape."""
    return term.scaling if term.gate is None else term.gate * term.scaling


def stack(terms: Sequence[Term]) -> Term:
    """One term equal to the sum of several: the As above each other, the Bs side by side (exact, any ranks).

    Mixers are multiplied into A; gates and unequal scalings become a gate with one entry per row of A. Differentiable.
    """
    if len(terms) == 1:
        return terms[0]
    with without_autocast(terms[0].A.device.type):
        return _stack(terms)


def _stack(terms: Sequence[Term]) -> Term:
    A, B, ranks = _stack_factors([t.A if t.M is None else t.M.to(t.A.dtype) @ t.A for t in terms], [t.B for t in terms])
    scalings = tuple(t.scaling for t in terms)
    gate = None
    if any(t.gate is not None for t in terms):
        ones = _per_row((1.0,) * len(terms), ranks, A)
        gates = zip(terms, ones.split(ranks), strict=True)
        gate = torch.cat([one if t.gate is None else t.gate.expand(len(one)) for t, one in gates])
    if all(s == scalings[0] for s in scalings):
        return Term(A, B, None, gate, scalings[0])
    rows = _per_row(scalings, ranks, A)
    return Term(A, B, None, rows if gate is None else gate * rows)


def stack_plain(As: list[Tensor], Bs: list[Tensor], scalings: Sequence[float]) -> Term:
    """:func:`stack` for terms without mixers and gates."""
    with without_autocast(As[0].device.type):
        A, B, ranks = _stack_factors(As, Bs)
    if all(s == scalings[0] for s in scalings):
        return Term(A, B, None, None, scalings[0])
    return Term(A, B, None, _per_row(tuple(scalings), ranks, A))


def _stack_factors(As: list[Tensor], Bs: list[Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    ranks = tuple(len(A) for A in As)
    if is_traced() or len({factor.dtype for factor in (*As, *Bs)}) > 1:
        return torch.cat(As), torch.cat(Bs, dim=1), ranks
    return *_Stacked.apply(ranks, *As, *Bs), ranks


class _Stacked(torch.autograd.Function):
    """The As above each other and the Bs side by side; their gradients are rows of two tensors, not many copies."""

    @staticmethod
    def forward(ctx: Any, ranks: tuple[int, ...], *factors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks
        return torch.cat(factors[: len(ranks)]), torch.cat(factors[len(ranks) :], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor, grad_B: Tensor) -> tuple:
        ranks = ctx.ranks
        if len({*ranks}) > 1:
            return None, *grad_A.split(ranks), *grad_B.split(ranks, dim=1)
        return None, *grad_A.split(ranks), *grad_B.unflatten(1, (len(ranks), ranks[0])).movedim(1, 0).contiguous()


def _per_row(values: tuple[float, ...], ranks: tuple[int, ...], A: Tensor) -> Tensor:
    """One number for each row of A, from one for each term."""
    make = _constant.__wrapped__ if is_traced() else _constant
    return make(values, ranks, A.device, compute_dtype(A))


@lru_cache(maxsize=64)  # sums of many adapters would else make as many small tensors in each layer
def _constant(values: tuple[float, ...], ranks: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a constant made while generating is saved in training
        rows = [value for value, rank in zip(values, ranks, strict=True) for _ in range(rank)]
        return torch.tensor(rows, device=device, dtype=dtype)


def fold(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Plain LoRA factors with scale 1: A' (sum r, in) and B' (out, sum r) with ``B' A' = sum_n g_n s_n B_n M_n A_n``.

    Exact up to one rounding of each factor in at least float32.
    """
    with without_autocast(terms[0].A.device.type):
        return _fold(terms)


def _fold(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(*(factor for term in terms for factor in (term.A, term.B)))
    # Before they are multiplied: terms may all but cancel, and rounding M A would not.
    term = stack(
        [t._replace(A=t.A.to(dtype), B=t.B.to(dtype), M=None if t.M is None else t.M.to(dtype)) for t in terms]
    )
    A, B = term.A, term.B
    if term.M is not None:
        A = term.M.to(dtype) @ A
    return A, B * scale(term)
