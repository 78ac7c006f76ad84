"""GaLore's state on disk: per parameter its own entries, and the inner optimizer's under "inner".

    step            how many steps the weight has had
    left, right     its bases, (m, r) and (n, r), at least float32; none with refresh="random", which draws them again
    norm            the last norm of Fira's or APOLLO's growth limiter
    inner           what the inner optimizer keeps for the compact parameter, or for a parameter that is not projected

Tensors and numbers only, so that ``torch.load(..., weights_only=True)`` reads it.
"""

from typing import Any

import torch
from torch import Tensor

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
    """Raise ValueError if a saved group was not GaLore's, or has another rank or side, which decide the shapes."""
    for mine, theirs in zip(groups, saved, strict=False):  # torch's load_state_dict compares the lengths
        for key in ("rank", "side"):
            if key not in theirs or mine[key] != theirs[key]:
                raise ValueError(
                    f"the saved state has {key}={theirs.get(key)!r} where this GaLore has {mine[key]!r}; pass the "
                    "options of the run that saved it"
                )
