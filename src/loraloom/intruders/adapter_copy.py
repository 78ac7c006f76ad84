"""A second adapter made like a first one, with nothing of it initialised and nothing else of the model touched."""

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loraloom.adapter.live import adapted_layers
from loraloom.intruders.copies import CHANGES_BASE, patterns


def add_copy(model: PeftModel, adapter: str, new_adapter: str, ranks: dict[str, int]) -> None:
    """An empty adapter like another one, with these ranks and the same scales, without initialising anything."""
    old: Any = model.peft_config[adapter]
    layers = {layer.name: layer for layer in adapted_layers(model, adapter)}
    config = copy.deepcopy(old)
    lora = old.peft_type == "LORA"
    if any(ranks[name] != layer.rank for name, layer in layers.items()):
        if str(old.init_lora_weights).lower().startswith(CHANGES_BASE) and lora:
            raise ValueError(
                f"init_lora_weights={old.init_lora_weights!r} has changed the base weights by an amount that goes with "
                "the rank, so that a copy of another rank could not be loaded again: use rank='keep'."
            )
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("pissa", "olora"):
            config.init_lora_weights = True
        for key, pattern in patterns([*layers.values()], ranks, old.use_rslora).items():
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
