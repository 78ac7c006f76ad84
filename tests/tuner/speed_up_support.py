"""Pairs of equal models with PEFT's LoRA, one as it is and one sped up: every layer kind and every feature."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from loraloom import speed_up
from loraloom.tuner.quantized import prevent_cpu_repacking
from tests.tuner.support import make_base, make_input, quantised_base, randomise

KINDS = ("linear", "conv1d", "nf4", "int8", "gptq", "awq")
QUANTISED = ("nf4", "int8")  # in float32, the rest in float64

# One LoraConfig per adapter; all adapters of a feature are active together.
FEATURES: dict[str, list[dict[str, Any]]] = {
    "lora": [{}],
    "rslora": [{"use_rslora": True}],
    "dropout": [{"lora_dropout": 0.3}],
    "dora": [{"use_dora": True}],
    "dora, dropout": [{"use_dora": True, "lora_dropout": 0.3}],
    "pissa": [{"init_lora_weights": "pissa"}],
    "olora": [{"init_lora_weights": "olora"}],
    "mica": [{"init_lora_weights": "mica"}],
    "three": [{}, {"r": 2}, {"use_rslora": True, "r": 3}],
    "dora among others": [{}, {"use_dora": True}, {"r": 2}, {"r": 3}, {"use_dora": True, "r": 2}],
    "dropouts among others": [
        {"lora_dropout": 0.3},
        {"use_dora": True, "lora_dropout": 0.2},
        {"r": 2},
        {"use_dora": True},
    ],
    # PEFT's own code:
    "lora_bias": [{"lora_bias": True}],
    "lora_bias among others": [{}, {"lora_bias": True}],
}
KEPT = ("lora_bias", "lora_bias among others")
# What PEFT refuses or cannot do itself: DoRA, starts from the base weight and MiCA on these bases.
_PLAIN = ("lora", "rslora", "dropout", "three", "lora_bias", "lora_bias among others")
CASES = [(k, f) for k in KINDS for f in FEATURES if k in ("linear", "conv1d", "nf4") or f in _PLAIN]
# PEFT refuses these, or its own initialisation fails on a weight stored (in, out).
CASES = [case for case in CASES if case not in {("conv1d", "olora"), ("nf4", "pissa"), ("nf4", "mica")}]
IDS = [f"{kind}-{feature}" for kind, feature in CASES]

# Backends that are not installed: PEFT's layer around a stand-in for the quantised one.
_STAND_INS: dict[str, Callable] = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear}


def input_of(kind: str, seed: int = 1) -> torch.Tensor:
    if kind in QUANTISED:
        return make_input("nf4", seed=seed)
    return make_input("linear", torch.float64, seed)


def base_of(kind: str) -> nn.Module:
    if kind in QUANTISED:
        base = quantised_base(kind)
        prevent_cpu_repacking(base)  # bitsandbytes' own fault, see there; it is not what is compared here
        return base
    return make_base("linear" if kind in _STAND_INS else kind)


def model_of(kind: str, feature: str) -> PeftModel:
    """PEFT's model with the feature's adapters a0, a1, ..., all active, in training mode."""
    torch.manual_seed(0)
    common = {"r": 4, "lora_alpha": 6, "target_modules": ["target"], "fan_in_fan_out": kind == "conv1d"}
    configs = [LoraConfig(**common | own) for own in FEATURES[feature]]
    base = base_of(kind)
    if kind in _STAND_INS:
        custom = {type(base.target): _STAND_INS[kind]}
        for config in configs:
            config._register_custom_module(custom)
    model = get_peft_model(base, configs[0], "a0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    model.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    randomise(model)
    return (model if kind in QUANTISED else model.double()).train()


def pair(kind: str, feature: str) -> tuple[PeftModel, PeftModel]:
    """PEFT's model, and an equal one that is sped up."""
    theirs, ours = model_of(kind, feature), model_of(kind, feature)
    report = speed_up(ours)
    assert (report.fast, [*report.kept]) == (([], [NAME]) if feature in KEPT else ([NAME], []))
    return theirs, ours


NAME = "base_model.model.target"


def layer_of(model: PeftModel) -> lora.LoraLayer:
    return model.base_model.model.target


def assert_same(actual: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    """Equal but for the order of additions: 64 products in float32 may be off by 64 times half of 1.2e-7."""
    tolerance = (4e-6 if kind in QUANTISED else 1e-12) * max(expected.abs().max().item(), 1.0)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
