"""Writing a base weight that torch computes: by the inverse of the rule where there is one, a refusal elsewhere.

`torch.nn.utils.parametrize` makes a weight from other tensors at each access (weight_norm, orthogonal, spectral_norm);
the older `torch.nn.utils.weight_norm` and pruning do it in a hook. A value copied into such a weight is lost.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from loraloom.errors import InputError


def tensors_behind(module: nn.Module) -> list[Tensor]:
    """The tensors that the module's weight is, or is computed from."""
    if not is_parametrized(module, "weight"):
        return [module.weight]  # type: ignore[list-item]
    rule: nn.Module = module.parametrizations.weight  # type: ignore[union-attr, assignment]
    return [*rule.parameters(), *rule.buffers()]


@torch.no_grad()
def write_weight(module: nn.Module, value: Tensor) -> None:
    """Makes the module's weight the value.

    Args:
        module: a layer that is not quantised.
        value: of the weight's shape and dtype.

    Raises:
        InputError: "computed-weight": the weight is computed by a rule that cannot give the value. Nothing has changed.
    """
    if isinstance(module._parameters.get("weight"), Tensor):
        module.weight.copy_(value)  # type: ignore[operator]
        return
    advice = "remove the pruning or the norm first"
    if is_parametrized(module, "weight"):
        before = [tensor.clone() for tensor in tensors_behind(module)]
        try:
            module.weight = value
            written: Tensor = module.weight
            rounding = 10 * torch.finfo(value.dtype).eps * value.abs().max().item()
            if torch.allclose(written, value, rtol=0, atol=rounding):
                return
        except (NotImplementedError, RuntimeError, ValueError):  # no inverse, or not for this value
            pass
        for tensor, stored in zip(tensors_behind(module), before, strict=True):
            tensor.copy_(stored)
        advice = "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
    raise InputError(
        f"The weight of this {type(module).__name__} is computed from other tensors, so a merged one would be lost: "
        f"{advice}, or use the adapter unmerged.",
        code="computed-weight",
    )
