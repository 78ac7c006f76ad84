"""A second adapter made like a first one, with nothing of it initialised and nothing else of the model touched."""

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loraloom.adapter.live import LiveAdapter
from loraloom.adapter.peft_features import start_changed_base
from loraloom.errors import InputError
from loraloom.intruders.copies import patterns


def add_copy(model: PeftModel, adapter: str, new_adapter: str, ranks: dict[str, int]) -> None:
    """An empty adapter like another one, with these ranks and the same scales, without initialising anything."""
    old: Any = model.peft_config[adapter]
    source = LiveAdapter(model, adapter)
    if source.config.get("ensure_weight_tying") and any(module.embedding for module in source.modules.values()):
        raise InputError(
            f"{source.where} adapts a table that is the output head as well, to which PEFT cannot add a second one: "
            "save it and use loraloom intruders",
            code="tied",
        )
    config = copy.deepcopy(old)
    lora = old.peft_type == "LORA"
    start = old.init_lora_weights
    if any(ranks[name] != module.rank for name, module in source.modules.items()):
        if start_changed_base(source.config):
            raise InputError(
                f"init_lora_weights={start!r} starts from the base weights by an amount that goes with the rank, so "
                "that a copy of another rank could not be loaded again: use rank='keep'",
                code="altered-base",
            )
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("pissa", "olora"):
            config.init_lora_weights = True
        for key, pattern in patterns(source.modules.values(), ranks, old.use_rslora).items():
            setattr(config, key, pattern)
    wanted = {"init_lora_weights": config.init_lora_weights, "modules_to_save": copy.copy(config.modules_to_save)}
    if lora:
        config.init_lora_weights = False  # PEFT's initialisation could change the base weights
    # PEFT refuses a second adapter with biases; this one has the same ones.
    biases = [(other, other.bias) for other in (*model.peft_config.values(), config)]
    for other, _ in biases:
        other.bias = "none"
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            model.add_adapter(new_adapter, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    finally:
        for other, bias in biases:
            other.bias = bias
    for name, value in wanted.items():
        setattr(config, name, value)


def copy_auxiliaries(model: PeftModel, adapter: str, new_adapter: str) -> None:
    """Copies what an adapter has besides its layers: modules_to_save and trainable tokens."""
    for module in model.modules():
        saved = getattr(module, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict) and adapter in saved and new_adapter in saved:
            saved[new_adapter] = copy.deepcopy(saved[adapter]).requires_grad_(False)
        deltas = getattr(module, "trainable_tokens_delta", None)
        if isinstance(deltas, nn.ParameterDict) and adapter in deltas and new_adapter in deltas:
            deltas[new_adapter] = nn.Parameter(deltas[adapter].detach().clone(), requires_grad=False)
