"""The members of a composition, from a folder, the hub or the model itself, checked against the base model."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from loraloom.adapter.open import open_adapter
from loraloom.adapter.protocol import AdaptedModule, Adapter
from loraloom.adapter.stored import StoredAdapter
from loraloom.errors import InputError
from loraloom.io.checkpoint import read_json
from loraloom.text import did_you_mean
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import features_of

# Fields of a model's configuration that make it another model, under their various names.
_ARCHITECTURE = (
    *("model_type", "hidden_size", "n_embd", "d_model", "dim", "num_hidden_layers", "n_layer", "n_layers"),
    *("num_layers", "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
    *("intermediate_size", "n_inner", "d_ff", "hidden_act", "rope_theta"),
)


def open_source(model: nn.Module, name: str, where: str | Path) -> Adapter:
    """One member, whose update is a product B A plus a bias in every module.

    Args:
        model: the model; if it is a PeftModel, ``where`` may be the name of one of its adapters.
        name: what the composition calls the member.
        where: folder, repository of the hub, or adapter.

    Raises:
        InputError: nothing there, or the adapter holds more than low-rank updates of the base model.
    """
    if isinstance(model, PeftModel) and str(where) in model.peft_config:
        source: Adapter = open_adapter((model, str(where)))
    else:
        try:
            source = open_adapter(where)
        except InputError as error:
            loaded = list(model.peft_config) if isinstance(model, PeftModel) else []
            raise InputError(f"member {name!r}: {error}{did_you_mean(str(where), loaded)}", code=error.code) from None
    _check_config(name, source)
    _check_others(name, source)
    if isinstance(source, StoredAdapter):
        _check_architecture(name, source, model)
    if expert := next((module.expert for module in source.modules.values() if module.expert is not None), None):
        raise InputError(
            f"member {name!r} adapts the experts of {expert.parameter}, which a composition does not take: merge it",
            code="experts",
        )
    if dora := next((name for name, module in source.modules.items() if "magnitude" in module.shapes()), None):
        raise InputError(
            f"member {name!r} is a DoRA adapter ({dora} has a magnitude), whose update is no product B A: turn it into "
            "a LoRA first, peft.save_as_lora(folder, model, rank=...), and compose that",
            code="dora",
        )
    return source


def modules_of(source: Adapter) -> dict[str, AdaptedModule]:
    """The modules of a member, the head that is tied to an adapted table among them."""
    return {**source.modules, **getattr(source, "twins", {})}


def ranks_of(name: str, source: Adapter, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Module -> rank of the member's update there.

    Args:
        name: the member.
        source: the member's tensors.
        shapes: (out, in) of the base model's layers that can be adapted.

    Raises:
        InputError: a module or a shape differs from the base model's.
    """
    ranks = {}
    for module, member in modules_of(source).items():
        if module not in shapes:
            raise InputError(
                f"member {name!r} adapts {module}, which the model does not have{did_you_mean(module, shapes)}: it "
                "belongs to another base model",
                code="unresolved",
            )
        shape = member.shape
        if shape != shapes[module]:
            raise InputError(
                f"member {name!r}: its update of {module} is {shape[0]} x {shape[1]}, the layer "
                f"{' x '.join(map(str, shapes[module]))}: it belongs to another base model",
                code="shape",
            )
        ranks[module] = member.factors()[0].shape[0]
    return ranks


def layer_shapes(model: nn.Module, modules: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out, in) as matrices, kernels flattened into `in`, of those modules that exist in the model."""
    layers = dict(model.named_modules())
    return {module: _shape(layers[module]) for module in modules if module in layers}


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, LoomLayer):
        layer = layer.get_base_layer()
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    inputs, outputs = features_of(layer)
    return outputs, inputs


def _check_config(name: str, source: Adapter) -> None:
    config = source.config
    for key, harmless in (("bias", "none"), ("trainable_token_indices", None)):
        if (value := config.get(key)) and value != harmless:
            raise InputError(
                f"member {name!r} has {key}={value!r}: more than low-rank updates was trained, and a composition is "
                "made of those only",
                code="more-than-low-rank",
            )


def _check_others(name: str, source: Adapter) -> None:
    heads = source.config.get("modules_to_save") or []
    left_out = set()
    for key in source.others:
        parts = key.split(".")
        if head := next((head for head in heads if head in parts), None):
            left_out.add(head)
        # PEFT writes the base's own table beside the update of an embedding.
        elif not any(f"{module}." in key for module in source.modules):
            raise InputError(
                f"member {name!r} holds {key}, which is no part of a low-rank update", code="more-than-low-rank"
            )
    if left_out:
        warnings.warn(
            f"member {name!r}: {', '.join(sorted(left_out))}, which was trained in full, stays out: a composition is "
            "made of low-rank updates.",
            stacklevel=4,
        )


def _check_architecture(name: str, source: StoredAdapter, model: nn.Module) -> None:
    """Compares with the base model that the member names, where that is a folder on this machine."""
    folder = Path(source.config.get("base_model_name_or_path") or "")
    config = getattr(model, "config", None)
    if not (hasattr(config, "to_dict") and folder.name and (folder / "config.json").is_file()):
        return
    theirs, ours = read_json(folder / "config.json"), config.to_dict()  # type: ignore[union-attr]
    for key in _ARCHITECTURE:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise InputError(
                f"member {name!r} was trained on {folder}, where {key} is {theirs[key]!r}; "
                f"this model has {ours[key]!r}",
                code="other-base",
            )
