"""The half of GaLore that is no maths: an inner optimizer over compact parameters, kept in step with the outer groups.

The inner optimizer has one group for each of ours, with the compact parameter in place of each projected weight. Ours
are the ones that users, schedulers and checkpoints see; before every step the inner groups are overwritten from them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loraloom.errors import InputError
from loraloom.optim.galore.compact import Slot
from loraloom.optim.galore.state import IDENTITY, check_saved_groups, joined_state, on_device, split_state
from loraloom.optim.registry import INNER, import_optimizer

# Keys of our groups that the inner optimizer does not get; decay is applied here, to the whole weight.
_OURS = {"params", "param_names", "name", "is_gate", "rank", "update_gap", "scale", "side", "weight_decay", *IDENTITY}


class OuterOptimizer(Optimizer):
    """An optimizer whose arithmetic another one does, on stand-ins of some parameters.

    Attributes:
        inner: the other one; set it with `adopt`.
        slots: the parameters that have a stand-in, by the tensor in ``param_groups``.
    """

    inner: Optimizer
    slots: dict[Tensor, Slot]

    def inner_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The inner optimizer's group for one of ours: its own options, and the stand-ins."""
        options = {key: value for key, value in group.items() if key not in _OURS}
        return {**options, "params": self._stand_ins(group), "weight_decay": 0.0}

    def adopt(self, inner: Optimizer) -> None:
        """Take an optimizer over all `inner_group`s, and its options into our groups and defaults."""
        self.inner = inner
        for group, inner_group in zip(self.param_groups, inner.param_groups, strict=True):
            complete(group, inner_group)
        complete(self.defaults, inner.defaults)

    def synchronize(self) -> None:
        """Give the inner optimizer the rates and other options that the groups have now, and their parameters.

        Raises:
            InputError: the groups hold a parameter that is new to it.
        """
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            kept = {id(p) for p in self._stand_ins(group)}
            if not kept <= {id(p) for p in inner_group["params"]}:
                raise InputError(
                    "param_groups hold a parameter that GaLore was not given; use add_param_group, and build GaLore "
                    "after fully_shard. DeepSpeed ZeRO replaces the weights by flat vectors and can't be used with it",
                    code="foreign-parameter",
                )
            for p in inner_group["params"]:
                if id(p) not in kept:  # it was removed from the groups
                    self.inner.state.pop(p, None)
            inner_group |= self.inner_group(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors and numbers only. The inner optimizer's state of a parameter is under "inner"."""
        result = super().state_dict()
        # Both number their parameters in the order of the same groups.
        return {**result, "state": joined_state(result["state"], self.inner.state_dict()["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but bases keep their precision, where torch casts them to the weight's.

        Raises:
            InputError: the state is another optimizer's, or of other options that decide what it means.
        """
        own, inner = split_state(state_dict)
        check_saved_groups(self.param_groups, state_dict["param_groups"])
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.update({parameters[i]: on_device(values, parameters[i].device) for i, values in own.items()})
        self.inner.load_state_dict({**self.inner.state_dict(), "state": inner})
        self.synchronize()

    def _stand_ins(self, group: dict[str, Any]) -> list[Tensor]:
        return [self.slots[p].compact if p in self.slots else p for p in group["params"]]


def complete(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Add the inner optimizer's options, so that schedulers of momentum find them and the groups can override them."""
    for key, value in options.items():
        if key not in _OURS:
            group.setdefault(key, value)


def inner_class(inner: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """The optimizer's class by its name in `INNER`, or as it was given.

    Raises:
        InputError: the name is unknown, or its package is not installed.
    """
    return import_optimizer(inner, INNER) if isinstance(inner, str) else inner


def reads_weights(build: Callable[[list[dict[str, Any]]], Optimizer], options: dict[str, Any], like: Tensor) -> bool:
    """Whether an optimizer's step depends on the weight: one with a trust ratio (LAMB), or with a step relative to it.

    Two weights, one zero and one not, get the same gradient and one step.

    Args:
        build: makes the optimizer from groups.
        options: of a group; its rate is replaced, and it has no weight decay.
        like: a tensor on the device where to try.
    """
    gradient = torch.linspace(0.5, 1.0, 256, device=like.device).view(16, 16)
    steps = []
    for value in (0.0, 1.0):
        weight = nn.Parameter(torch.full_like(gradient, value))
        weight.grad = gradient.clone()
        build([{**options, "params": [weight], "lr": 0.01}]).step()
        steps.append(weight.detach() - value)
    # Adding 1 costs a step of 0.01 five of its digits.
    return not torch.allclose(steps[0], steps[1], rtol=1e-3, atol=1e-6)
