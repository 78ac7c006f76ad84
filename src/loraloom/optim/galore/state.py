"""GaLore's state on disk: per parameter its own entries, and the inner optimizer's under "inner".

    step            how many steps the weight has had
    left, right     its bases, (m, r) and (n, r), at least float32; none with APOLLO, which draws them again
    left_scale, right_scale     with basis_bits=8, when left and right are int8: the scale of each column, (r,)
    norm            the last norm of Fira's or APOLLO's growth limiter
    error           with rounding="kahan": what rounding cut off, of the weight's shape and dtype
    inner           what the inner optimizer keeps for the compact parameter, or for a parameter that is not projected

Tensors and numbers only, so that ``torch.load(..., weights_only=True)`` reads it.
"""

from typing import Any

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.optim.galore.bases import Bases, dequantize, quantize

# Keys of a group that decide what a saved state means, beside rank and side, which decide its shapes.
IDENTITY = ("method", "inner", "refresh", "basis_bits", "rounding")

State = dict[int, dict[str, Any]]


def joined_state(own: State, inner: State) -> State:
    """The two states as one, by the parameters' numbers."""
    joined = {i: dict(values) for i, values in own.items()}
    for i, values in inner.items():
        joined.setdefault(i, {})["inner"] = values
    return joined


def split_state(state_dict: dict[str, Any]) -> tuple[State, State]:
    """The inverse of `joined_state`, from a whole state dict, which may have names in place of the numbers."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    joined = {i: state_dict["state"][key] for i, key in enumerate(keys) if key in state_dict["state"]}
    own = {i: {key: value for key, value in values.items() if key != "inner"} for i, values in joined.items()}
    inner = {i: values["inner"] for i, values in joined.items() if "inner" in values}
    return {i: values for i, values in own.items() if values}, inner


def on_device(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy with its tensors on a device and in their own dtype."""
    return {key: value.to(device, copy=True) if isinstance(value, Tensor) else value for key, value in values.items()}


def check_saved_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Refuse the state of another optimizer, or of other options that decide its shapes or what it means.

    Raises:
        InputError: "other-state".
    """
    for mine, theirs in zip(groups, saved, strict=False):  # torch's load_state_dict compares the lengths
        for key in (*IDENTITY, "rank", "side"):
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"the saved state has {key}={theirs.get(key)!r} where this optimizer has {mine.get(key)!r}; pass "
                    "the options of the run that saved it",
                    code="other-state",
                )


def stored_bases(state: dict[str, Any]) -> Bases:
    """The bases in one weight's state, None where there is none."""
    return _stored(state, "left"), _stored(state, "right")


def store_bases(state: dict[str, Any], bases: Bases, bits: int) -> None:
    """Put new bases into one weight's state, in 32 bits or in 8."""
    for name, basis in zip(("left", "right"), bases, strict=True):
        if basis is None:
            continue
        if bits == 32:
            state[name] = basis
        else:
            state[name], state[f"{name}_scale"] = quantize(basis)


def _stored(state: dict[str, Any], name: str) -> Tensor | None:
    basis, scale = state.get(name), state.get(f"{name}_scale")
    return basis if basis is None or scale is None else dequantize(basis, scale)
