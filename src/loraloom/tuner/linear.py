"""Linear layers: nn.Linear, transformers' Conv1D, and every quantised linear that PEFT's backends resolve."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import features_of
from loraloom.update.linear import adapted_linear
from loraloom.update.node import LinearMap, Weight
from loraloom.update.parts import LOOM, Name
from loraloom.update.terms import Term, scale, stack_plain
from loraloom.update.traced import is_traced

_FOUR_BIT = {"Linear4bit", "LinearFP4", "LinearNF4"}
_OF_TERMS: tuple[Name, ...] = ("A", "B", "mixer", "gate", "anchor_A")


def calls_only_forward(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else: no hook, no offloading."""
    return "forward" not in vars(module) and not (  # accelerate's offloading replaces it
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether calling the module is ``F.linear`` of its weight and nothing else: no subclass, hook or offloading."""
    return (
        type(module) is nn.Linear
        and type(module._parameters.get("weight")) is nn.Parameter  # else sharded, quantised or parametrized
        and calls_only_forward(module)
    )


def calls_only_linear(base: Any, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``base(x)`` is ``F.linear(x, base.weight, base.bias)``, so that one node can compute base and adapter."""
    if not is_plain_linear(base):
        return False
    weight: Any = base._parameters["weight"]  # not base.weight: nn.Module's look-up costs a microsecond
    return x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type)


def four_bit_map(base: Any, matrix: Callable[[], Tensor], magnitude: Tensor | None) -> LinearMap | None:
    """A 4-bit base layer of bitsandbytes as a map for the node, in training; ``matrix`` dequantises its weight.

    None for other layers, for one with hooks, and with a magnitude for one with a bias.
    """
    if type(base).__name__ not in _FOUR_BIT or not type(base).__module__.startswith("bitsandbytes."):
        return None
    if not torch.is_grad_enabled() or is_traced() or not calls_only_forward(base):
        return None
    if magnitude is not None and base._parameters["bias"] is not None:
        return None
    return LinearMap(base, matrix)


class LoomLinear(LoomLayer):
    """``y = c (x W^T + g s drop(x) A^T M^T B^T) + bias`` with c = m / rownorm(W + D) for DoRA, else 1."""

    def read_base(self, config: LoomConfig) -> None:
        base = self.get_base_layer()
        self.in_features, self.out_features = features_of(base)
        self.fan_in_fan_out = isinstance(base, Conv1D) or (config.fan_in_fan_out and not isinstance(base, nn.Linear))

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)  # transposing twice is nothing

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT can turn the delta of a linear layer into a LoRA; of others it would write one that loads wrong."""
        return adapter_name not in self.holder("member_bias")

    def low_rank(self, x: Tensor, term: Term, dropout: float) -> Tensor:
        h = F.linear((F.dropout(x, dropout) if dropout else x).to(term.A.dtype), term.A)
        if term.M is not None:
            h = F.linear(h, term.M)
        return F.linear((h * scale(term)).to(term.B.dtype), term.B)

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]
        if not self.add_up(adapters):
            return super().adapted_forward(x, adapters, *args, **kwargs)
        # One node for base and adapter: no second pass over the output, nor over the gradient of the input.
        if calls_only_linear(base, x):
            return self._adapt_by(adapters, x, base._parameters["bias"], W=base._parameters["weight"])
        if (four_bit := four_bit_map(base, self.base_matrix, self.magnitude(adapters[0]))) is not None:
            return self._adapt_by(adapters, x, base._parameters["bias"], W=four_bit)
        return super().adapted_forward(x, adapters, *args, **kwargs)

    def stacked(self, adapters: list[str]) -> Term:
        holders = {name: self._modules[LOOM[name]]._modules for name in _OF_TERMS}  # type: ignore[union-attr]
        if len(adapters) == 1 or self.compositions or any(holders[name] for name in _OF_TERMS[2:]):
            return super().stacked(adapters)
        # The same for many adapters of A and B alone, in a tenth of the time that their terms take one by one.
        As, Bs = ([holders[name][a]._parameters["weight"] for a in adapters] for name in _OF_TERMS[:2])  # type: ignore[union-attr]
        if any(factor.is_meta for factor in (*As, *Bs)):  # type: ignore[union-attr]
            return super().stacked(adapters)
        return stack_plain(As, Bs, [self.scaling[a] for a in adapters])  # type: ignore[arg-type]

    def adapt_together(self, adapters: list[str], x: Tensor, base_out: Tensor) -> Tensor:
        return self._adapt_by(adapters, x, getattr(self.get_base_layer(), "bias", None), base_out)

    def _adapt_by(
        self, names: list[str], x: Tensor, bias: Tensor | None, base_out: Tensor | None = None, W: Weight | None = None
    ) -> Tensor:
        magnitude = self.magnitude(names[0])
        result = adapted_linear(
            x,
            self.stacked(names),
            base_out=base_out,
            W=W,
            bias=bias,
            magnitude=magnitude,
            norm=None if magnitude is None else self.lazy_row_norm(names[0]),
            dropout=self.dropout[names[0]] if self.training else 0.0,
        )
        if self._modules[LOOM["member_bias"]]._modules:  # type: ignore[union-attr]
            for name in names:
                if (delta := self.bias_delta(name)) is not None:
                    result = result + delta.to(result.dtype)
        return result
