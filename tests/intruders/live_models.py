"""Models with one adapted layer of every kind, and their weights, for the tests of live adapters."""

from functools import partial

import torch
from peft import LoraConfig, get_peft_model

from loraloom.adapter.live import LiveAdapter
from loraloom.tuner.quantized import prevent_cpu_repacking
from tests.tuner.support import ALL_PARTS, KINDS, PART_IDS, PARTS, adapted, make_base, quantised_base, randomise

EPSILON = 0.97  # so that small random layers have intruders
OPTIONS = {"epsilon": EPSILON, "top_k": 4}


def lora_adapted(kind, seed=2, **kwargs):
    """PEFT's LoRA on the toy layer."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["target"], fan_in_fan_out=kind == "conv1d", **kwargs)
    base = quantised_base("int8") if kind == "int8" else make_base(kind)
    model = get_peft_model(base, config).eval()
    prevent_cpu_repacking(model)
    randomise(model, seed)
    return model


def weight_of(model, adapter="default", name=None):
    """W' of the only adapted layer."""
    return next(iter(LiveAdapter(model, adapter).modules.values())).adapted_weight()


def state(model, without="new"):
    return {k: v.clone() for k, v in model.state_dict().items() if f".{without}" not in k}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LOOM_PARTS = ("lora", "rslora", "dora", "mixer+gate+dora+rslora")
MAKERS = {
    f"loom {kind} {name}": partial(adapted, parts, kind)
    for kind in KINDS
    for parts, name in zip(PARTS, PART_IDS, strict=True)
    if name in LOOM_PARTS
}
MAKERS |= {f"lora {kind}": partial(lora_adapted, kind) for kind in [*KINDS, "int8"]}
MAKERS |= {f"lora {kind} dora": partial(lora_adapted, kind, use_dora=True) for kind in KINDS}
MAKERS |= {
    "loom pissa": partial(adapted, ALL_PARTS, "linear", init_lora_weights="pissa"),
    "lora rslora": partial(lora_adapted, "linear", use_rslora=True),
    "lora bias": partial(lora_adapted, "linear", lora_bias=True),
}
