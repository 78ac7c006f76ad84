"""What a composition adds to a layer: logits beside the stacked factors, which stay frozen, and the members' biases."""

from typing import Any

import torch
from torch import Tensor, nn

from loraloom.tuner.peft_internals import BaseTunerLayer
from loraloom.update.composition import Composition, LayerComposition


class Factor(nn.Module):
    """Holds one tensor of an adapter. Each has a module of its own, so that sharding and saving see plain weights."""

    dtype_is_settled = False  # see LoomModel._cast_adapter_dtype

    def __init__(self, weight: Tensor, trainable: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)

    def forward(self) -> Tensor:
        """The tensor; where accelerate has offloaded it, calling the module brings it in."""
        return self.weight

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class ComposedLayer(BaseTunerLayer):
    """The part of a loom layer that compositions use; see `loraloom.update.composition`."""

    compositions: dict[str, LayerComposition]
    holder: Any
    factor: Any
    optional_factor: Any
    _move_adapter_to_device_of_base_layer: Any

    def get_base_layer(self) -> Any:
        """The wrapped layer."""
        return super().get_base_layer()

    def add_composition(self, adapter_name: str, composition: Composition, module: str) -> None:
        """Makes an adapter, just added with rank ``sum(composition.ranks[module])``, a composition with equal weights.

        Its factors are zero until :func:`loraloom.compose` or a checkpoint fills them.
        """
        part = self.compositions[adapter_name] = LayerComposition(composition, module)
        A, B = self.factor("A", adapter_name), self.factor("B", adapter_name)
        self.holder("logits")[adapter_name] = Factor(part.start(), trainable=A.requires_grad)
        if module in composition.biased:
            bias = torch.zeros(len(part.ranks), B.shape[0], dtype=A.dtype)
            self.holder("member_bias")[adapter_name] = Factor(bias, trainable=False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._freeze_members()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; the members of a composition stay frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_members()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As PEFT's; the members of a composition stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_members()

    def _freeze_members(self) -> None:
        for name, part in self.compositions.items():
            for frozen in ["A", "B", *([] if part.trainable else ["logits"])]:
                self.holder(frozen)[name].requires_grad_(False)

    def bias_delta(self, adapter_name: str) -> Tensor | None:
        """What a composition adds to the bias (out,), or None where no member adds to it."""
        biases = self.optional_factor("member_bias", adapter_name)
        if biases is None:
            return None
        logits = self.factor("logits", adapter_name)
        return self.compositions[adapter_name].weights(logits).to(biases.dtype) @ biases
