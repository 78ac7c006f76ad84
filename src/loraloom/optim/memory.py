"""Memory of a training run: bytes of weights, gradients and optimizer state, before the first step makes them."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loraloom.optim.galore.compact import Slot
from loraloom.optim.galore.engine import ProjectedOptimizer
from loraloom.optim.galore.methods import GaLore
from loraloom.optim.muon import Muon
from loraloom.optim.rounding import compensated
from loraloom.optim.weight_adam import WeightAdam
from loraloom.text import text_table

_STEP = 4  # torch's optimizers count the steps of each parameter in a float32


@dataclass(frozen=True)
class Memory:
    """Bytes; activations, and what libraries hold back for themselves, are not in it.

    Attributes:
        weights: all parameters of the model, trained or not, as they are stored.
        gradients: the most that exist at once, at the end of the last backward pass of a step.
        state: of the optimizer from its first step on; None where it is not known before.
    """

    weights: int
    gradients: int
    state: int | None


def expected_memory(model: nn.Module, optimizer: Optimizer) -> Memory:
    """What training the model with this optimizer will hold.

    Args:
        model: on one device, its weights whole.
        optimizer: over some of its parameters. The state is known for torch's AdamW, SGD and Adafactor, bitsandbytes'
            AdamW and Lion (but for their tables of 1 KiB in 8 bits), `WeightAdam`, `Muon`, and GaLore, Fira and
            APOLLO with any of these inside.
    """
    gradients = sum(_size(p) for p in model.parameters() if p.requires_grad)
    if isinstance(optimizer, ProjectedOptimizer) and optimizer.layerwise:
        slots = optimizer.projected.values()
        whole = [_size(slot.weight) for slot in slots]
        gradients += max(whole) - sum(whole) + sum(_size(slot.compact) for slot in slots)
    return Memory(sum(map(_size, model.parameters())), gradients, expected_state_bytes(optimizer))


def adamw_memory(model: nn.Module) -> Memory:
    """What training the same parameters with AdamW would hold."""
    trained = [_size(p) for p in model.parameters() if p.requires_grad]
    return Memory(sum(map(_size, model.parameters())), sum(trained), sum(2 * size + _STEP for size in trained))


def expected_state_bytes(optimizer: Optimizer) -> int | None:
    """Bytes of state from the first step on, if every parameter gets a gradient; None where that is not known."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            expected = _expected(optimizer, group, p)
            if expected is None:
                return None
            total += expected
    return total


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer's state holds now, whichever optimizer it is."""
    return _bytes(optimizer.state_dict()["state"])


def format_galore(optimizer: ProjectedOptimizer) -> str:
    """What GaLore does with each kind of parameter, as a table of text: shape, treatment, tensors, parameters, state.

    The last column is `expected_state_bytes`, or a dash with an inner optimizer for which that is not known.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    known, projected = True, optimizer.projected
    for group in optimizer.param_groups:
        for p in group["params"]:
            slot = projected.get(p)
            weight = p if slot is None else slot.weight
            if slot is not None:
                treatment = f"{'full' if all(slot.sides) else 'left' if slot.sides[0] else 'right'}, rank {slot.rank}"
            elif group["rank"] is None or p.ndim != 2:
                treatment = "not projected"
            else:
                treatment = f"not projected: a side <= {group['rank']}"
            row = rows.setdefault((" x ".join(map(str, weight.shape)), treatment), [0, 0, 0])
            row[0] += 1
            row[1] += weight.numel()
            expected = _expected(optimizer, group, p)
            known = known and expected is not None
            row[2] += expected or 0
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    table = [(key, counts) for key, counts in rows.items()] + [(("total", ""), totals)]
    cells = [["shape", "treatment", "tensors", "parameters", "state bytes"]]
    for key, (tensors, parameters, state) in table:
        cells.append([*key, f"{tensors:,}", f"{parameters:,}", f"{state:,}" if known else "-"])
    return text_table(cells, left=2)


def _expected(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> int | None:
    """Bytes of state of one parameter in ``group["params"]``."""
    if not isinstance(optimizer, ProjectedOptimizer):
        return _moments(optimizer, group, p)
    slot = optimizer.slots.get(p)
    if slot is None:
        return _moments(optimizer.inner, group, p)
    inner = _moments(optimizer.inner, group, slot.compact)
    return None if inner is None else inner + _own_bytes(optimizer, slot)


def _own_bytes(optimizer: ProjectedOptimizer, slot: Slot) -> int:
    """What GaLore itself keeps for a weight: bases, what Kahan's sum carries, and the norm of the growth limiter."""
    o, item = optimizer.options, slot.compact.element_size()
    total = _size(slot.weight) if o.rounding == "kahan" and compensated(slot.weight, o.rounding) else 0
    if slot.rank is None:
        return total
    if optimizer.needs_gradient:
        total += item
    if isinstance(optimizer, GaLore):
        columns = [size for size, side in zip(slot.shape, slot.sides, strict=True) if side]
        basis = item if optimizer.options.basis_bits == 32 else 1
        scales = 0 if optimizer.options.basis_bits == 32 else item
        total += sum(slot.rank * (size * basis + scales) for size in columns)
    return total


def _moments(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> int | None:
    """Bytes that a plain optimizer keeps for one parameter."""
    kind = type(optimizer)
    if kind is WeightAdam and group["is_gate"] and group["gate_method"] == "sgd":
        return _size(p) if group["gate_momentum"] else 0
    if kind is WeightAdam and compensated(p, group["rounding"]):
        return 2 * 4 * p.numel() + _STEP + (_size(p) if group["rounding"] == "kahan" else 0)
    if kind in (torch.optim.AdamW, WeightAdam):
        return (3 if group.get("amsgrad") else 2) * _size(p) + _STEP
    if kind is torch.optim.SGD:
        return _size(p) if group["momentum"] else 0
    if kind is torch.optim.Adafactor:
        factored = prod(p.shape[:-2]) * sum(p.shape[-2:]) if p.ndim > 1 else p.numel()
        return factored * p.element_size() + _STEP
    if kind is Muon:
        return _size(p) if group["use_muon"] else 2 * _size(p) + _STEP
    if kind.__module__.startswith("bitsandbytes"):
        return _bitsandbytes(optimizer, p)
    return None


def _bitsandbytes(optimizer: Any, p: Tensor) -> int | None:
    """Bytes that an AdamW or Lion of bitsandbytes keeps for one parameter."""
    name = type(optimizer).__name__
    moments = 2 if "AdamW" in name else 1 if "Lion" in name else None
    if moments is None:
        return None
    in_32_bits = any(getattr(module, name) is p for module, name, _ in optimizer.mng.module_weight_config_triple)
    if "8bit" not in name or in_32_bits or p.numel() < optimizer.args.min_8bit_size:
        return moments * 4 * p.numel()
    return moments * (p.numel() + 4 * -(-p.numel() // 256))  # and a float32 maximum per block of 256


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_bytes, value))


def _size(p: Tensor) -> int:
    return p.numel() * p.element_size()
