"""How a step is added to a weight. Between 1 and 2, bfloat16 has steps of 1/128: smaller updates are lost to rounding.

    nearest       W <- round(W + D)
    kahan         Y = D + E,  W' = round(W + Y),  E' = Y - (W' - W)       E carries what rounding cut off
    stochastic    W <- up or down, with probabilities that make the mean W + D

D is float32, W and E bfloat16 (arXiv 2010.06192 compares the last two). A float32 weight needs neither.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loraloom.errors import InputError
from loraloom.optim.options import Rounding


def compensated(weight: Tensor, rounding: Rounding) -> bool:
    """Whether a weight needs another way to round than the usual one."""
    return rounding != "nearest" and weight.dtype == torch.bfloat16


def check_rounding(rounding: Rounding, weights: Iterable[Tensor]) -> None:
    """Warn if bfloat16 weights will lose steps; refuse another rounding where there are none.

    Raises:
        InputError: "not-bfloat16".
    """
    dtypes = {weight.dtype for weight in weights}
    if rounding == "nearest" and torch.bfloat16 in dtypes:
        warnings.warn(
            "bfloat16 weights lose steps below 1/256 of a weight to rounding; pass rounding='kahan' (two more bytes a "
            "weight) or 'stochastic', or train float32 weights",
            stacklevel=3,
        )
    elif rounding != "nearest" and torch.bfloat16 not in dtypes:
        found = ", ".join(sorted(map(str, dtypes)))
        raise InputError(
            f"rounding={rounding!r} is for bfloat16 weights, and these are {found}; leave it out", code="not-bfloat16"
        )


def move_(W: Tensor, D: Tensor, decay: float, rounding: Rounding, error: Tensor | None, seed: int) -> None:
    """W <- (W + D) (1 - decay), rounded once.

    Args:
        W: a weight of any shape, changed in place.
        D: the step, of W's shape, float32 or wider.
        decay: learning rate times weight decay.
        rounding: what a bfloat16 weight is rounded by; others are always rounded to the nearest.
        error: for "kahan", what the last steps left over, of W's shape and dtype; changed in place.
        seed: for "stochastic", of what is drawn.
    """
    if decay:
        D = D - decay * (W + D)
    if not compensated(W, rounding):
        W.add_(D)
        return
    W, D = _local(W), _local(D)
    if rounding == "stochastic":
        W.copy_(_rounded_at_random(W + D, seed))
    else:
        error = _local(error) if error is not None else torch.zeros_like(W)
        Y = D + error
        before = W.clone()
        W.copy_(before + Y)
        error.copy_(Y - (W.to(Y.dtype) - before))


def _rounded_at_random(values: Tensor, seed: int) -> Tensor:
    """Float32 values, cut to bfloat16's 16 bits after random numbers were added to the bits that go."""
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return (values.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))).view(torch.float32)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
