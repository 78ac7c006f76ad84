"""Writing a base weight that torch computes: by the inverse of the rule where there is one, a refusal elsewhere.

`torch.nn.utils.parametrize` makes a weight from other tensors at each access (weight_norm, orthogonal, spectral_norm);
the older `torch.nn.utils.weight_norm` and pruning do it in a hook. A value copied into such a weight is lost.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from loraloom.errors import InputError


def tensors_behind(module: nn.Module, name: str = "weight") -> list[Tensor]:
    """The tensors that the module's weight is, or is computed from."""
    if not is_parametrized(module, name):
        return [getattr(module, name)]
    rule: Any = module.parametrizations[name]  # type: ignore[index]
    return [*rule.parameters(), *rule.buffers()]


@torch.no_grad()
def write_weight(module: nn.Module, value: Tensor, name: str = "weight") -> None:
    """Makes the module's weight the value.

    Args:
        module: a layer that is not quantised.
        value: of the weight's shape and dtype.
        name: of the weight, where it is another parameter.

    Raises:
        InputError: "computed-weight": the weight is computed by a rule that cannot give the value. Nothing has changed.
    """
    if isinstance(module._parameters.get(name), Tensor):
        getattr(module, name).copy_(value)
        return
    advice = "remove the pruning or the norm first"
    if is_parametrized(module, name):
        before = [tensor.clone() for tensor in tensors_behind(module, name)]
        try:
            setattr(module, name, value)
            written: Tensor = getattr(module, name)
            rounding = 10 * torch.finfo(value.dtype).eps * value.abs().max().item()
            if torch.allclose(written, value, rtol=0, atol=rounding):
                return
        except (NotImplementedError, RuntimeError, ValueError):  # no inverse, or not for this value
            pass
        for tensor, stored in zip(tensors_behind(module, name), before, strict=True):
            tensor.copy_(stored)
        advice = "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
    raise InputError(
        f"The weight of this {type(module).__name__} is computed from other tensors, so a merged one would be lost: "
        f"{advice}, or use the adapter unmerged.",
        code="computed-weight",
    )
