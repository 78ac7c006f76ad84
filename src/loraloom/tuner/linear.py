"""Linear layers: nn.Linear, transformers' Conv1D, and every quantised linear that PEFT's backends resolve."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import features_of
from loraloom.update.linear import adapted_linear
from loraloom.update.terms import stack


def is_plain_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether calling the module is ``F.linear`` of its weight and nothing else: no subclass, hook or offloading."""
    return (
        type(module) is nn.Linear
        and type(module._parameters.get("weight")) is nn.Parameter  # else sharded, quantised or parametrized
        and "forward" not in vars(module)  # accelerate's offloading replaces it
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )


def calls_only_linear(base: Any, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``base(x)`` is ``F.linear(x, base.weight, base.bias)``, so that one node can compute base and adapter."""
    if not is_plain_linear(base):
        return False
    weight: Any = base._parameters["weight"]  # not base.weight: nn.Module's look-up costs a microsecond
    return x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type)


class LoomLinear(LoomLayer):
    """``y = c (x W^T + g s drop(x) A^T M^T B^T) + bias`` with c = m / rownorm(W + D) for DoRA, else 1."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoomConfig,
        r: int,
        lora_alpha: int,
        quantization_backend: Any = None,
    ) -> None:
        super().__init__(base_layer, quantization_backend)
        self.in_features, self.out_features = features_of(base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D) or (
            config.fan_in_fan_out and not isinstance(base_layer, nn.Linear)
        )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)  # transposing twice is nothing

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT can turn the delta of a linear layer into a LoRA; of others it would write one that loads wrong."""
        return adapter_name not in self.loom_member_bias

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self._modules["base_layer"]
        if not self._add_up(adapters) or not calls_only_linear(base, x):
            return super().adapted_forward(x, adapters, *args, **kwargs)
        # One node for base and adapter: no second pass over the output, nor over the gradient of the input.
        return self._adapt_by(adapters, x, base._parameters["bias"], W=base._parameters["weight"])

    def _add_up(self, adapters: list[str]) -> bool:
        """Whether the adapters are as one with stacked factors: plain ones, none with a dropout mask of its own."""
        return len(adapters) == 1 or not any(
            self.magnitude(name) is not None or (self.training and self.dropout[name]) for name in adapters
        )

    def adapt(self, base_out: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        bias = getattr(self.get_base_layer(), "bias", None)
        if self._add_up(adapters):
            return self._adapt_by(adapters, x, bias, base_out)
        dora = [name for name in adapters if self.magnitude(name) is not None]
        plain = [name for name in adapters if name not in dora]
        result = base_out
        for name in dora:
            # Each DoRA adapter refers to the base weight alone, as in merging; several of them add their differences.
            result = result + (self._adapt_by([name], x, bias, base_out) - base_out)
        for names in [plain] if plain and self._add_up(plain) else [[name] for name in plain]:
            result = self._adapt_by(names, x, bias, result)
        return result

    def _adapt_by(
        self, names: list[str], x: Tensor, bias: Tensor | None, base_out: Tensor | None = None, W: Tensor | None = None
    ) -> Tensor:
        """The output with adapters that add up (see _add_up), which are one with stacked factors."""
        term = stack([term for name in names for term in self.terms(name)])
        dropout = self.dropout[names[0]] if self.training else 0.0
        magnitude = self.magnitude(names[0])
        norm = None if magnitude is None else self.row_norm(names[0])
        result = adapted_linear(
            x, term, base_out=base_out, W=W, bias=bias, magnitude=magnitude, norm=norm, dropout=dropout
        )
        for name in names:
            if (delta := self.bias_delta(name)) is not None:
                result = result + delta.to(result.dtype)
        return result
