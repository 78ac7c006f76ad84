"""Type LORA wherever the adapter is one: our configuration as PEFT's, and a LoRA's folder as an adapter of ours.

config = as_lora(LoomConfig.dora(r=16))              # a peft.LoraConfig, or None where there is no equal one
model = load_lora(model, "lora-folder", use_mixer="orthogonal")    # goes on as MoSLoRA
"""

import copy
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft import set_peft_model_state_dict as set_state_dict
from torch import nn
from transformers import PreTrainedModel

from loraloom.errors import InputError
from loraloom.tuner.config import FORMAT_VERSION, LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.model import LoomModel
from loraloom.tuner.targets import prepare_targets
from loraloom.tuner.weight_reads import modules_read
from loraloom.update.parts import LOOM, LORA, LORA_EMBEDDING

_BIASES = {"loom_only": "lora_only"}
_PARTS_OF_OURS = ("use_mixer", "use_gate", "composition")


def as_lora(config: LoomConfig, model: nn.Module) -> LoraConfig | None:
    """The ``peft.LoraConfig`` that means the same on a model, or None.

    Args:
        config: our configuration.
        model: the base model. Its names are checked, as they are when the adapter is ours; PEFT would train less than
            asked for without a word.

    Returns:
        None where the adapter has a part that LoRA has not, starts from the base weight (PEFT changes the base for it),
        or adapts a weight that the model reads without calling its layer (PEFT's adapter would have no effect).

    Raises:
        ValueError: a name in target_modules or in a pattern matches nothing.
    """
    if any(getattr(config, part) for part in _PARTS_OF_OURS) or config.init_lora_weights in ("pissa", "olora"):
        return None
    checked = copy.deepcopy(config)
    is_target = partial(LoomModel._check_target_module_exists, checked)
    if checked.target_modules is None and checked.target_parameters is None:
        return None  # PEFT's choice for the architecture; the check comes when it is made
    prepare_targets(checked, model, is_target)
    if any(is_target(name) for name in modules_read(model)):
        return None
    theirs = {f.name for f in fields(LoraConfig)}
    values = {f.name: getattr(checked, f.name) for f in fields(LoomConfig) if f.name in theirs}
    del values["peft_type"]
    values["bias"] = _BIASES.get(values["bias"], values["bias"])
    return LoraConfig(**values)


@torch.no_grad()
def load_lora(
    model: PreTrainedModel | nn.Module, folder: str, adapter_name: str = "default", **parts: Any
) -> PeftModel:
    """Loads a LoRA as a loom adapter, to train on with more parts; it starts as the same function.

    A mixer starts as the identity, a gate as 1, and the magnitude of a LoRA without one as the row norm of its weight.
    `loraloom.composition.to_lora` and ``loraloom export`` are the way back.

    Args:
        model: the base model, changed in place.
        folder: folder or repository of an adapter of type LORA.
        adapter_name: its name in the model.
        **parts: fields of :class:`LoomConfig` to set besides: ``use_mixer="orthogonal"``, ``use_gate=True``,
            ``use_dora=True``, ``lora_dropout=0.1``.

    Raises:
        InputError: the adapter is not a LoRA, or it starts from base weights that PEFT changed.
        ValueError: it uses something that loraloom does not have.
    """
    saved = LoraConfig.from_pretrained(folder)
    if not isinstance(saved, LoraConfig):
        raise InputError(f"{folder} holds an adapter of type {saved.peft_type}, not LORA", code="not-a-lora")
    start = saved.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(
            f"{folder} starts from base weights that init_lora_weights={start!r} changed: save it from PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER) and load that",
            code="altered-base",
        )
    saved.init_lora_weights = True
    config = LoomConfig.from_lora(saved, **{"inference_mode": False, "loom_format_version": FORMAT_VERSION} | parts)
    loaded = get_peft_model(model, config, adapter_name)
    state = {_our_key(key): tensor for key, tensor in load_peft_weights(folder, device="cpu").items()}
    layers = [layer for layer in loaded.modules() if isinstance(layer, LoomLayer)]
    for layer in layers:
        if layer.has_adapter(adapter_name) and adapter_name in layer.holder("mixer"):
            nn.init.eye_(layer.factor("mixer", adapter_name))
    # What the LoRA has not stays as it starts; PEFT's loader wants it from us.
    own = get_peft_model_state_dict(loaded, adapter_name=adapter_name)
    if stray := sorted(state.keys() - own.keys()):
        raise InputError(
            f"{folder} has {len(stray)} tensors that have no place in this model ({stray[0]}, ...): is it of another "
            "base model?",
            code="wrong-base",
        )
    set_state_dict(loaded, own | state, adapter_name=adapter_name)
    if config.use_dora and not saved.use_dora:
        for layer in layers:
            if layer.has_adapter(adapter_name):
                layer.factor("magnitude", adapter_name).copy_(layer.row_norm(adapter_name))
    return loaded


def _our_key(key: str) -> str:
    """A tensor's name in a file of type LORA -> in one of ours."""
    module, _, last = key.removesuffix(".weight").rpartition(".")
    for part, theirs in (*LORA.items(), *LORA_EMBEDDING.items()):
        if last == theirs:
            return f"{module}.{LOOM[part]}.weight"
    return key
