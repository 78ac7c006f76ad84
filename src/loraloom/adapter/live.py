"""Adapters in a model: of our layers and of PEFT's LoRA layers, of every kind, quantised ones too."""

from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from typing import Any

from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from loraloom.adapter.peft_features import check_config
from loraloom.adapter.protocol import AdaptedModule, Adapter, Parts
from loraloom.adapter.stored import for_training_only, split_name
from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import BaseTunerLayer, resolve_quantization_backend
from loraloom.tuner.quantized import prevent_cpu_repacking


class LiveModule(AdaptedModule):
    """One layer of a PEFT model. Nothing here changes it but :meth:`store`."""

    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter
        self.scaling = layer.scaling[adapter]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {part: tuple(tensor.shape) for part, tensor in self.unchecked_parts().items()}

    @property
    def where(self) -> str:
        return f"{self.name} of adapter {self.adapter!r}"

    @property
    def embedding(self) -> bool:
        return isinstance(self.layer.get_base_layer(), nn.Embedding)

    @property
    def quantized(self) -> bool:
        """Whether the base weight is quantised."""
        return resolve_quantization_backend(self.layer.get_base_layer()) is not None

    def store(self, adapter: str, parts: Parts) -> None:
        """Gives another adapter of this layer, of the same make, these tensors."""
        raise NotImplementedError


class LoomModule(LiveModule):
    """A layer of ours."""

    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        super().__init__(name, layer, adapter)
        self.composition = layer.compositions.get(adapter)

    def weight(self) -> Tensor:
        return self.layer.base_matrix().detach()

    def unchecked_parts(self) -> Parts:
        return {name: tensor.detach() for name, tensor in self.layer.parts(self.adapter).items()}

    def store(self, adapter: str, parts: Parts) -> None:
        for name, value in parts.items():
            factor = self.layer.holder(name)[adapter]
            factor.weight = nn.Parameter(value, requires_grad=factor.weight.requires_grad)
            factor.dtype_is_settled = True


class LoraModule(LiveModule):
    """A LoRA layer of PEFT's."""

    def weight(self) -> Tensor:
        base = self.layer.get_base_layer()
        backend = resolve_quantization_backend(base)
        weight = base.weight.detach() if backend is None else backend.get_base_weight(base).detach()
        if self.embedding or (backend is None and getattr(self.layer, "fan_in_fan_out", False)):
            return weight.T
        return weight.flatten(1)

    def unchecked_parts(self) -> Parts:
        return {part: getattr(holder, leaf).detach() for part, (holder, leaf) in self._holders(self.adapter).items()}

    def store(self, adapter: str, parts: Parts) -> None:
        for part, (holder, leaf) in self._holders(adapter).items():
            if part in parts:
                old = getattr(holder, leaf)
                setattr(holder, leaf, nn.Parameter(parts[part], requires_grad=old.requires_grad))

    def _holders(self, adapter: str) -> dict[str, tuple[Any, str]]:
        """Part -> the module that holds it, and the name of the attribute."""
        layer = self.layer
        if adapter in layer.lora_embedding_A:
            holders = {"A": (layer.lora_embedding_A, adapter), "B": (layer.lora_embedding_B, adapter)}
        else:
            holders = {"A": (layer.lora_A[adapter], "weight"), "B": (layer.lora_B[adapter], "weight")}
            if layer.lora_B[adapter].bias is not None:
                holders["bias"] = layer.lora_B[adapter], "bias"
        if adapter in layer.lora_magnitude_vector:
            holders["magnitude"] = layer.lora_magnitude_vector[adapter], "weight"
        return holders


class LiveAdapter(Adapter):
    """An adapter of a PEFT model.

    Args:
        model: the model.
        name: of the adapter.

    Raises:
        InputError: the model has no such adapter, it is of a kind that is not understood, or adapters are merged.
    """

    modules: dict[str, LiveModule]
    sha256 = ""

    def __init__(self, model: PeftModel, name: str) -> None:
        if not isinstance(model, PeftModel):
            kind = type(model).__name__
            raise InputError(
                f"a {kind} is not a PeftModel: load the adapter with PeftModel.from_pretrained", code="no-adapter"
            )
        if name not in model.peft_config:
            near = did_you_mean(name, model.peft_config)
            raise InputError(
                f"adapter {name!r} is not in the model, which has {', '.join(map(repr, model.peft_config))}{near}",
                code="no-adapter",
            )
        self.model, self.name = model, name
        self.where = f"adapter {name!r} of the model"
        self.config = _plain(asdict(model.peft_config[name]))
        self.kind = str(self.config["peft_type"])
        check_config(self.config, self.where)
        if parameters := self.config.get("target_parameters"):
            raise InputError(
                f"{self.where} has target_parameters ({', '.join(parameters)}), which is one update per expert of a "
                "mixture: save it, and use the file",
                code="parameter-adapter",
            )
        prevent_cpu_repacking(model)
        base: Any = model.base_model
        self.modules = {}
        for path, layer in base.model.named_modules():
            if not _has(layer, name):
                continue
            if layer.merged:
                raise InputError(f"{path} has merged adapters: call unmerge_adapter() first", code="merged")
            if isinstance(layer, MultiheadAttention | ParamWrapper):
                raise InputError(f"{path}: a {type(layer).__name__} of PEFT is not W + s B A", code="other-function")
            self.modules[path] = (LoomModule if isinstance(layer, LoomLayer) else LoraModule)(path, layer, name)

    @property
    def others(self) -> list[str]:
        return [key for key, _ in self.other_tensors()]

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        # save_embedding_layers: only what was trained, and not the base's own tables.
        state = get_peft_model_state_dict(self.model, adapter_name=self.name, save_embedding_layers=False)
        others = {key: tensor for key, tensor in state.items() if split_name(key, self.kind)[1] is None}
        return ((key, tensor) for key, tensor in others.items() if not for_training_only(key))


def _has(layer: Any, adapter: str) -> bool:
    if isinstance(layer, LoomLayer):
        return layer.has_adapter(adapter)
    is_lora = isinstance(layer, BaseTunerLayer) and isinstance(layer, lora.LoraLayer)
    return is_lora and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)


def _plain(value: Any) -> Any:
    """As adapter_config.json would hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return sorted(map(_plain, value)) if isinstance(value, set | frozenset) else value
