"""``speed_up``: PEFT's own LoRA layers, computed by loraloom.

    model = get_peft_model(model, LoraConfig(...))
    print(loraloom.speed_up(model))

Each LoRA layer gets a class that overrides ``forward`` and nothing else. Parameters, state dict, configuration, saved
files, merging and switching stay PEFT's. The arithmetic is `loraloom.update.linear.adapted_linear` and the norm's cache
`loraloom.tuner.row_norm`, the same that a ``LoomConfig`` adapter uses.

With dropout the mask is PEFT's own, drawn from the same random state, so a seeded run goes on as it would have. For a
DoRA adapter PEFT drops the input of the base weight's share too, ``y = x W^T + b + c (x_d W^T + s x_d A^T B^T) -
x_d W^T``, and so does this.
"""

import copy
import functools
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.errors import InputError
from loraloom.tuner import peft_internals
from loraloom.tuner.linear import calls_only_linear, four_bit_map, is_plain_linear
from loraloom.tuner.row_norm import RowNormCache
from loraloom.update.linear import adapted_linear
from loraloom.update.node import Weight
from loraloom.update.one_pass import MakeNorm
from loraloom.update.parts import LORA
from loraloom.update.terms import Term, stack
from loraloom.update.traced import is_traced
from loraloom.update.update import row_norm_of


@dataclass(frozen=True)
class SpeedUpReport:
    """Which LoRA layers loraloom computes. ``str(report)`` says it in words.

    Attributes:
        fast: names of the layers that loraloom computes.
        kept: name of a layer -> why PEFT's own code goes on computing it, with the adapter's name where that is why.
    """

    fast: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"loraloom computes {len(self.fast)} of {len(self.fast) + len(self.kept)} LoRA layers."]
        by_reason = sorted(self.kept.items(), key=lambda item: item[1])
        for reason, items in itertools.groupby(by_reason, key=lambda item: item[1]):
            names = [name for name, _ in items]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"PEFT computes {names[0]}{more}: {reason}.")
        return "\n".join(lines)


def speed_up(model: nn.Module) -> SpeedUpReport:
    """Lets loraloom compute the LoRA layers of a model, in place; files and everything else stay PEFT's.

    Adapters that are added later are covered. Where PEFT's code must compute (see the report), it does, layer by layer
    and call by call: merged or disabled adapters, ``adapter_names``, hooks on A or B, variants other than DoRA.

    Args:
        model: a PeftModel, or a model with injected LoRA layers (transformers' ``add_adapter``, diffusers).

    Returns:
        Which layers loraloom computes; which stay PEFT's, and why.

    Raises:
        InputError: the model has no LoRA layers.
    """
    layers = dict(_lora_layers(model))
    if not layers:
        raise InputError(
            f"speed_up: the {type(model).__name__} has no LoRA layers; add an adapter first, with "
            "get_peft_model(model, LoraConfig(...)). A LoomConfig adapter needs no speed_up",
            code="no-lora-layers",
        )
    peft_internals.after_injection(_cover)
    report = SpeedUpReport()
    for name, layer in layers.items():
        reason = _swap(layer) or _why_not_an_adapter(layer)
        if reason is None:
            report.fast.append(name)
        else:
            report.kept[name] = reason
    return report


def slow_down(model: nn.Module) -> None:
    """Undoes :func:`speed_up`: every LoRA layer of the model has PEFT's class again."""
    for _, layer in _lora_layers(model):
        if isinstance(layer, FastLora):
            layer.__class__ = _stock_class(type(layer))


class FastLora(nn.Module):
    """What :func:`speed_up` puts before the class of a PEFT LoRA layer: another forward pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the PEFT layer's, whose code computes what :func:`_parts` says no to."""
        layer: Any = self
        if args or kwargs or layer.disable_adapters or layer.merged:
            return super().forward(x, *args, **kwargs)
        parts = _parts(layer)
        if not parts:
            return super().forward(x)
        groups = _groups(parts)
        base = layer._modules["base_layer"]
        if len(groups) == 1 and parts[0].dropout is None:
            if calls_only_linear(base, x):
                return _apply(layer, groups[0], x, None, base._parameters["weight"])
            magnitude = None if parts[0].magnitude is None else parts[0].magnitude.weight
            four_bit = four_bit_map(base, lambda: _base_matrix(layer), magnitude)
            if four_bit is not None:
                return _apply(layer, groups[0], x, None, four_bit)
        result = base(x)
        dtype = result.dtype
        if len(groups) > 1:  # rounded once, as PEFT does
            result = result.to(torch.promote_types(dtype, parts[0].term.A.dtype))
        for group in groups:
            result = _apply(layer, group, x, result)
        return result.to(dtype)

    def __deepcopy__(self, memo: dict) -> Any:
        duplicate: Any = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(vars(self), memo))
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickle holds PEFT's layer, and so opens where loraloom is not installed.
        return object.__new__, (_stock_class(type(self)),), vars(self)


class _Part(NamedTuple):
    """One active adapter of a layer."""

    term: Term
    dropout: nn.Module | None
    """The dropout that acts now, or None."""
    magnitude: Any
    """PEFT's module that holds DoRA's m, or None."""


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, peft_internals.LoraLayer))


@functools.cache
def _fast_class(stock: type) -> type:
    # The name stays: PEFT, transformers and bitsandbytes look for "Linear" in it.
    namespace = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (FastLora, stock), namespace)


def _stock_class(fast: type) -> type:
    index = fast.__mro__.index(FastLora)
    if index != 1:
        raise InputError(
            f"slow_down: {fast.__name__} was made of a sped-up layer by FSDP; call it before sharding",
            code="slow-down-after-sharding",
        )
    return fast.__mro__[2]


def _swap(layer: Any) -> str | None:
    """Makes a layer fast, or says why not."""
    stock: Any = _stock_class(type(layer)) if isinstance(layer, FastLora) else type(layer)
    if stock.forward not in peft_internals.lora_forwards():
        return f"{stock.__name__} has a forward pass of its own"
    if "forward" in vars(layer):
        return "its forward method is replaced (offloading, X-LoRA)"
    layer.__class__ = _fast_class(stock)
    return None


def _why_not_an_adapter(layer: Any) -> str | None:
    """Why PEFT's code computes an adapter of a layer, for the first such adapter, or None."""
    for name in layer.lora_A:
        part = _part(layer, name)
        if isinstance(part, str):
            return f"adapter {name!r}: {part}"
    return None


def _cover(model: nn.Module) -> None:
    """Adapters have been injected into a model: its new layers become fast if it is sped up."""
    layers = [layer for _, layer in _lora_layers(model)]
    if any(isinstance(layer, FastLora) for layer in layers):
        for layer in layers:
            _swap(layer)


def _parts(layer: Any) -> list[_Part] | None:
    """The active adapters in their order, or None where PEFT's code must compute one of them."""
    present = layer._modules[LORA["A"]]._modules
    parts = [_part(layer, name) for name in layer.active_adapters if name in present]
    if any(isinstance(part, str) for part in parts):
        return None
    return parts  # type: ignore[return-value]


def _part(layer: Any, name: str) -> _Part | str:
    """An adapter of a layer as it is now, or why PEFT's code must compute it."""
    modules = layer._modules
    A, B = modules[LORA["A"]]._modules[name], modules[LORA["B"]]._modules[name]
    variant = layer.lora_variant.get(name)
    dora = variant is not None and type(variant) is peft_internals.DoraLinearVariant
    if not (variant is None or dora or type(variant) is peft_internals.MiCALinearVariant):
        return f"{type(variant).__name__} has a forward pass of its own"
    if not (is_plain_linear(A) and is_plain_linear(B)):
        return "A or B is wrapped, sharded or has hooks"
    if B._parameters["bias"] is not None:
        return "lora_bias"
    magnitude = None
    if dora:
        magnitude = modules[LORA["magnitude"]]._modules[name]
        if magnitude._forward_hooks or magnitude._forward_pre_hooks or type(magnitude.weight) is not nn.Parameter:
            return "the magnitude is sharded or has hooks"
        if not peft_internals.has_base_weight(layer.get_base_layer()):
            return "DoRA on a base whose weight cannot be read"
    scaling = layer.scaling[name]  # a tensor after prepare_model_for_compiled_hotswap
    gate, scaling = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, scaling)
    term = Term(A._parameters["weight"], B._parameters["weight"], None, gate, scaling)  # type: ignore[arg-type]
    return _Part(term, _active_dropout(layer, name, dora), magnitude)


def _active_dropout(layer: Any, name: str, dora: bool) -> nn.Module | None:
    dropout = layer._modules["lora_dropout"]._modules[name]
    if dora:  # PEFT asks the layer, not the dropout
        acts = layer.training and type(dropout) is not nn.Identity
    else:
        acts = type(dropout) is not nn.Identity and (dropout.training or type(dropout) is not nn.Dropout)
    return dropout if acts else None


def _groups(parts: list[_Part]) -> list[list[_Part]]:
    """The parts in their order; neighbours that add up to one low-rank update are together."""
    groups: list[list[_Part]] = []
    for part in parts:
        alone = part.dropout is not None or part.magnitude is not None
        last = groups[-1][-1] if groups else None
        if alone or last is None or last.dropout is not None or last.magnitude is not None:
            groups.append([part])
        else:
            groups[-1].append(part)
    return groups


def _apply(layer: Any, group: list[_Part], x: Tensor, result: Tensor | None, W: Weight | None = None) -> Tensor:
    """Adds a group to the result so far; None stands for the base layer's output, which W then gives."""
    term = stack([part.term for part in group])
    dropout, magnitude = group[0].dropout, group[0].magnitude
    base = layer.get_base_layer()
    bias: Tensor | None = getattr(base, "bias", None)
    m = None if magnitude is None else magnitude.weight
    norm = None if magnitude is None else _row_norm(layer, magnitude, term)
    if result is None:
        return adapted_linear(x, term, W=W, bias=bias, magnitude=m, norm=norm)
    if dropout is None:
        return adapted_linear(x, term, base_out=result, bias=bias, magnitude=m, norm=norm)
    x = dropout(x.to(term.A.dtype))
    if magnitude is None:
        return adapted_linear(x, term, base_out=result)
    z = F.linear(x, _base_matrix(layer).to(x.dtype))
    return result + (adapted_linear(x, term, base_out=z, magnitude=m, norm=norm) - z)


# For PEFT's module of a magnitude, the base weight and the norms with it. The module is the key so that a deleted
# adapter takes its entry along and nothing is added to a layer. Merging into a quantised base makes a new weight,
# possibly at the same address, which the cache could take for the old one.
_row_norms: WeakKeyDictionary[nn.Module, tuple[weakref.ref, RowNormCache]] = WeakKeyDictionary()


def _row_norm(layer: Any, magnitude: nn.Module, term: Term) -> Tensor | MakeNorm:
    """``rownorm(W + D)`` (out,), cached, or a function that computes it."""
    parameter = layer.get_base_layer()._parameters.get("weight")
    if parameter is None or is_traced():
        with torch.no_grad():
            return row_norm_of(_base_matrix(layer), [term])
    known = _row_norms.get(magnitude)
    if known is None or known[0]() is not parameter:
        known = _row_norms[magnitude] = weakref.ref(parameter), RowNormCache()
    return known[1].lazily(parameter, lambda: _base_matrix(layer), [term])


def _base_matrix(layer: Any) -> Tensor:
    weight = peft_internals.base_weight(layer.get_base_layer())
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
