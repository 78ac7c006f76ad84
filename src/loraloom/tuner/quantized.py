"""Quantised base layers: what PEFT's backends leave to the caller."""

import copy

from torch import nn


def prevent_cpu_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers of a model in the layout that can be trained and dequantised.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward in eval mode;
    afterwards gradients through that layer are lost and dequantisation returns garbage. Every 4-bit layer matters,
    adapted or not, since gradients pass through all of them.

    Raises:
        RuntimeError: a layer has been repacked already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name}: bitsandbytes has repacked this 4-bit weight for inference (a forward pass in eval mode on a "
                "CPU with AVX512-BF16), and it can no longer be trained or merged. Load the base model again and add "
                "the adapter before the first forward pass."
            )
        module.support_avx512bf16_for_cpu = False


def snapshot(base_layer: nn.Module) -> tuple:
    """All that a backend's ``set_base_weight`` changes in a layer, for :func:`restore`. Copies no weight."""
    weight = base_layer.weight
    state = {name: copy.copy(vars(base_layer)[name]) for name in ("state", "quant_state") if name in vars(base_layer)}
    return base_layer, weight, dict(vars(weight)), state


def restore(saved: tuple) -> nn.Module:
    """Gives a layer back the very weight it had at :func:`snapshot`; returns the layer."""
    base_layer, weight, attributes, state = saved
    vars(weight).clear()
    vars(weight).update(attributes)
    base_layer.weight = weight
    vars(base_layer).update(state)
    return base_layer
