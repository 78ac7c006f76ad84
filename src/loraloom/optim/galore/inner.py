"""The half of GaLore that is no maths: an inner optimizer over stand-ins, kept in step with the outer groups.

The inner optimizer has one group for each of ours, with the compact parameter in place of each projected weight. Ours
are the ones that users, schedulers and checkpoints see; before every step the inner groups are overwritten from them.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from loraloom.optim.galore.compact import Projected
from loraloom.optim.galore.state import check_saved_groups, joined_state, on_device, split_state

# Keys of our groups that the inner optimizer does not get; decay is applied here, to the whole weight.
_OURS = {"params", "param_names", "name", "is_gate", "rank", "update_gap", "scale", "side", "weight_decay"}


class OuterOptimizer(Optimizer):
    """An optimizer whose arithmetic another one does, on stand-ins of some parameters.

    Attributes:
        inner: the other one; set it with `adopt`.
        projected: the parameters that have a stand-in, by the tensor in ``param_groups``.
    """

    inner: Optimizer
    projected: dict[Tensor, Projected]

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

    def synchronise(self) -> None:
        """Give the inner optimizer the rates and other options that the groups have now, and their parameters.

        Raises:
            ValueError: the groups hold a parameter that is new to it.
        """
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            kept = {id(p) for p in self._stand_ins(group)}
            if not kept <= {id(p) for p in inner_group["params"]}:
                raise ValueError(
                    "param_groups hold a parameter that GaLore was not given; use add_param_group, and build GaLore "
                    "after fully_shard. DeepSpeed ZeRO replaces the weights by flat vectors and can't be used with it"
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
            ValueError: the state is another optimizer's, or has another rank or side.
        """
        own, inner = split_state(state_dict)
        check_saved_groups(self.param_groups, state_dict["param_groups"])
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.update({parameters[i]: on_device(values, parameters[i].device) for i, values in own.items()})
        self.inner.load_state_dict({**self.inner.state_dict(), "state": inner})
        self.synchronise()

    def _stand_ins(self, group: dict[str, Any]) -> list[Tensor]:
        return [self.projected[p].compact if p in self.projected else p for p in group["params"]]


def complete(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Add the inner optimizer's options, so that schedulers of momentum find them and the groups can override them."""
    for key, value in options.items():
        if key not in _OURS:
            group.setdefault(key, value)
