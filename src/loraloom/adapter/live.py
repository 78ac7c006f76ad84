"""An adapter of a PEFT model, layer by layer: where its parts are, and where those of a copy go.

One class for our layers and one for PEFT's LoRA layers, of every kind: linear, Conv1D, embedding, convolution, and
quantised ones. What a copy is made of: :mod:`loraloom.intruders.copies`.
"""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from loraloom.intruders.copies import AdaptedLayer, Parts, flat
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import BaseTunerLayer, resolve_quantization_backend
from loraloom.tuner.quantized import prevent_cpu_repacking
from loraloom.update.parts import LOOM
from loraloom.update.terms import Term


class LayerOfModel(AdaptedLayer):
    """One layer of a PEFT model. Nothing here changes it but :meth:`store`."""

    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter
        self.rank, self.scaling = layer.r[adapter], layer.scaling[adapter]

    @property
    def quantized(self) -> bool:
        return self.layer.quantization_backend is not None

    def store(self, adapter: str, parts: Parts) -> None:
        """Gives another adapter of this layer, of the same make, these tensors."""
        raise NotImplementedError


class _Loom(LayerOfModel):
    A_name, B_name = "loom_lora_A", "loom_lora_B"

    def weight(self) -> Tensor:
        return self.layer.base_matrix().detach()

    def parts(self) -> Parts:
        parts = self.layer.parts(self.adapter).items()
        return {LOOM[name]: part for name, part in parts if name != "member_bias"}

    def terms(self) -> list[Term]:
        return self.layer.terms(self.adapter)

    def magnitude(self) -> Tensor | None:
        m = self.layer.magnitude(self.adapter)
        return None if m is None else m.detach()

    def store(self, adapter: str, parts: Parts) -> None:
        for name, value in parts.items():
            factor = getattr(self.layer, name)[adapter]
            factor.weight = nn.Parameter(value, requires_grad=factor.weight.requires_grad)
            factor.dtype_is_settled = True


class _Lora(LayerOfModel):
    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        super().__init__(name, layer, adapter)
        self.embedding = adapter in layer.lora_embedding_A
        self.A_name, self.B_name = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A", "lora_B")

    @property
    def quantized(self) -> bool:
        return resolve_quantization_backend(self.layer.get_base_layer()) is not None

    def weight(self) -> Tensor:
        base = self.layer.get_base_layer()
        backend = resolve_quantization_backend(base)
        weight = base.weight.detach() if backend is None else backend.get_base_weight(base).detach()
        if self.embedding or (backend is None and getattr(self.layer, "fan_in_fan_out", False)):
            return weight.T
        return weight.flatten(1)

    def parts(self) -> Parts:
        parts = {name: _weight(getattr(self.layer, name)[self.adapter]) for name in (self.A_name, self.B_name)}
        if not self.embedding and self.layer.lora_B[self.adapter].bias is not None:
            parts["lora_B.bias"] = self.layer.lora_B[self.adapter].bias
        if self.adapter in self.layer.lora_magnitude_vector:
            parts["lora_magnitude_vector"] = self.layer.lora_magnitude_vector[self.adapter].weight
        return parts

    def terms(self) -> list[Term]:
        parts = self.parts()
        A, B = flat(parts[self.A_name]), flat(parts[self.B_name])
        return [Term(A, B, scaling=self.scaling)]

    def magnitude(self) -> Tensor | None:
        if self.adapter not in self.layer.lora_magnitude_vector:
            return None
        return self.layer.lora_magnitude_vector[self.adapter].weight.detach().flatten()

    def store(self, adapter: str, parts: Parts) -> None:
        for name, value in parts.items():
            attribute, _, leaf = name.partition(".")
            holder = getattr(self.layer, attribute)
            if (self.embedding and attribute == self.A_name) or (self.embedding and attribute == self.B_name):
                holder[adapter] = nn.Parameter(value, requires_grad=holder[adapter].requires_grad)
            else:
                leaf = leaf or "weight"
                old = getattr(holder[adapter], leaf)
                setattr(holder[adapter], leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def _weight(holder: Any) -> Tensor:
    return holder if isinstance(holder, Tensor) else holder.weight


def adapted_layers(model: PeftModel, adapter: str) -> Iterator[LayerOfModel]:
    """The layers that have this adapter, with their names in the base model.

    Raises:
        ValueError: the model or the adapter is not of a kind that can be analysed, or adapters are merged.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"A {type(model).__name__} is not a PeftModel: load the adapter with PeftModel.from_pretrained."
        )
    if adapter not in model.peft_config:
        raise ValueError(
            f"adapter={adapter!r} is not in the model, which has {', '.join(map(repr, model.peft_config))}."
        )
    kind = str(getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type))
    if kind not in ("LORA", "LOOM"):
        raise ValueError(f"adapter={adapter!r} is of type {kind!s}: intruders are defined here for LORA and LOOM.")
    prevent_cpu_repacking(model)
    base: Any = model.base_model
    for name, layer in base.model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not _has(layer, adapter):
            continue
        if layer.merged:
            raise ValueError(f"{name} has merged adapters: call unmerge_adapter() first.")
        if isinstance(layer, LoomLayer):
            yield _Loom(name, layer, adapter)
        else:
            _check_lora(name, layer, adapter)
            yield _Lora(name, layer, adapter)


def _has(layer: Any, adapter: str) -> bool:
    if isinstance(layer, LoomLayer):
        return layer.has_adapter(adapter)
    return isinstance(layer, lora.LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)


def _check_lora(name: str, layer: Any, adapter: str) -> None:
    variant = layer.lora_variant.get(adapter)
    if isinstance(layer, MultiheadAttention | ParamWrapper):
        what = type(layer).__name__
    elif variant is not None and adapter not in layer.lora_magnitude_vector:
        what = type(variant).__name__
    else:
        return
    raise ValueError(f"{name}: a {what} of PEFT is not W + s B A, and has no intruders that are defined here.")
