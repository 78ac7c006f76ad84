"""Rewinding, the control for every claim about intruders: ``W(t) = W + t (W' - W)``, one number and no decomposition.

Without DoRA that scales B by t. With it, c = m / rownorm(W + B A) and W' = c (W + B A),

    W(t) = c_t W + t c B A,    c_t = 1 - t + t c,

which is a DoRA adapter as well: B_t = (t c / c_t) B, with the magnitude c_t rownorm(W + B_t A).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from loraloom.adapter.protocol import AdaptedModule, Parts, flat
from loraloom.errors import InputError
from loraloom.intruders.copies import copied
from loraloom.intruders.reduce import Rank, Scope, check_options
from loraloom.intruders.solvers.matrix import row_norms
from loraloom.update.update import row_scale

_SCALED = ("B", "anchor_B", "bias", "member_bias")


def plan_sweep(scales: Iterable[float], scope: Scope, rank: Rank, rewind: bool) -> list[tuple[float, bool]]:
    """What a sweep goes through: each scale of the intruders and, with `rewind`, of all of dW (True), but 1 once.

    Raises:
        ValueError: an option is out of range.
        InputError: a scale to rewind to does not lie between base and adapter.
    """
    scales = list(scales)
    for scale in scales:
        check_options(scale, scope, rank)
        if rewind and not 0 <= scale <= 1:
            raise InputError(f"scale {scale:g} cannot be rewound to: 0 is the base, 1 the adapter", code="rewind")
    if not rewind:
        return [(scale, False) for scale in scales]
    own = scales if 1 in scales else [1.0, *scales]
    return [(scale, False) for scale in own] + [(scale, True) for scale in own if scale != 1]


@torch.no_grad()
def rewound_matrix(W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, t: float) -> tuple[Tensor, Tensor | None]:
    """B (out, r) and DoRA's m (out,), or None, of the rewound update of W (out, in).

    Args:
        W: base weight.
        A, B: folded factors (r, in), (out, r).
        magnitude: m (out,), or None.
        t: in [0, 1].
    """
    if magnitude is None:
        return B * t, None
    factor, c = _factors(W, A, B, magnitude, t)
    B = B * factor[:, None].to(B)
    return B, (c * row_norms(W, A, B)).to(magnitude)


@torch.no_grad()
def rewound_copy(module: AdaptedModule, t: float) -> Parts:
    """The parts of a copy of the module with its update rewound; heads and tokens are no part of it."""
    parts, magnitude = copied(module), module.magnitude()
    if t == 1:
        return parts
    factor: Tensor | float = t
    if magnitude is not None:
        W = module.weight().float()
        A, B = module.factors()
        factor, _ = _factors(W, A, B, magnitude, t)
        new_magnitude = rewound_matrix(W, A, B, magnitude, t)[1]
        assert new_magnitude is not None
        parts["magnitude"] = new_magnitude.to(parts["magnitude"]).reshape(parts["magnitude"].shape)
    for name in _SCALED:
        if name in parts:
            stored = parts[name]
            by_row = isinstance(factor, Tensor) and name in ("B", "anchor_B")
            scaled = flat(stored) * factor[:, None].to(stored) if by_row else stored * t  # type: ignore[index]
            parts[name] = scaled.to(stored).reshape(stored.shape)
    return parts


def _factors(W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """``t c / c_t``, or 0 where c_t is 0, and ``c_t`` of each row (out,); such a row becomes 0 by its magnitude."""
    c = row_scale(magnitude.float(), row_norms(W, A, B))
    c_t = 1 - t + t * c
    return torch.where(c_t == 0, 0.0, t * c / c_t), c_t
