"""Changes to an adapted model between two training steps, with its optimizer and its configuration kept in step.

Each function leaves a model whose outputs are the same as before, and whose checkpoint loads.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from loraloom.errors import InputError
from loraloom.optim import remove_parameters, replace_parameter
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.embedding import LoomEmbedding
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.model import LoomModel
from loraloom.update.parts import Name
from loraloom.update.terms import alpha_of, scaling

_WIDENED: tuple[Name, ...] = ("A", "B", "mixer")  # what expand_ranks gives another shape


def adapted_layers(model: PeftModel, adapter: str) -> dict[str, LoomLayer]:
    """The layers that carry the adapter, by their name in the base model, in the model's order."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoomLayer) and module.has_adapter(adapter)
    }


def factors(layer: LoomLayer, adapter: str) -> list[Tensor]:
    """A, B and the mixer of one layer's adapter: all of its trained tensors but the gate."""
    return [part for name in _WIDENED if (part := layer.optional_factor(name, adapter)) is not None]


def gate(layer: LoomLayer, adapter: str) -> Tensor | None:
    """The gate of one layer's adapter, if it has one."""
    return layer.optional_factor("gate", adapter)


def count_parameters(layer: LoomLayer, adapter: str, r: int) -> int:
    """How many parameters A, B and the mixer would have at rank r."""
    shape_A, shape_B = layer.factor_shapes(r)
    return math.prod(shape_A) + math.prod(shape_B) + (r * r if adapter in layer.holder("mixer") else 0)


def disconnect(model: PeftModel, adapter: str, names: Iterable[str], optimizer: Optimizer) -> None:
    """Take the adapter off these layers; a layer without any adapter left gives its place back to the base layer.

    Exact for adapters whose gate is zero. Parameters, gradients and optimizer state are freed.
    """
    base = model.get_base_model()
    for name in names:
        layer = cast(LoomLayer, base.get_submodule(name))
        g = gate(layer, adapter)
        remove_parameters(optimizer, factors(layer, adapter) + ([] if g is None else [g]))
        layer.remove_adapter(adapter)
        if not layer.holder("A"):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.base_layer)
    _rewrite_config(model, adapter)


@torch.no_grad()
def fold_gates(model: PeftModel, adapter: str, optimizer: Optimizer) -> None:
    """Make every gate part of B: ``g s B A`` becomes ``s B' A`` with B' = g B; the gates leave the model.

    The gradient of B' is that of B divided by g, so Adam's moments are divided by g and by g^2.
    """
    for layer in adapted_layers(model, adapter).values():
        if (g := gate(layer, adapter)) is None:
            continue
        B = layer.factor("B", adapter)
        B.mul_(g)
        if (anchor := layer.optional_factor("anchor_B", adapter)) is not None:
            anchor.mul_(g)
        state = optimizer.state.get(B, {})
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            if key in state:
                state[key].div_(g**power)
        remove_parameters(optimizer, [g])
        del layer.holder("gate")[adapter]
    _rewrite_config(model, adapter)


@torch.no_grad()
def expand_ranks(
    model: PeftModel, adapter: str, ranks: dict[str, int], optimizer: Optimizer, seed: int
) -> dict[str, float]:
    """Raise the ranks of adapters; the function, the scale s and the training of the old directions stay as they are.

    A' = [A; c Q] and B' = [B, 0], where the rows of Q are orthonormal and orthogonal to A's, and c is the root mean
    square of A's singular values, so that A' is no worse conditioned than A. (On an embedding, where A is the side that
    starts at zero, A and B change places.) A mixer becomes diag(M, I). The new directions start with Adam's moments
    at zero and the old step count.

    Args:
        model: the adapted model.
        adapter: the adapter's name.
        ranks: new rank by layer name, none below the present one.
        optimizer: holds A, B and the mixers.
        seed: of the new directions; they are drawn on the CPU, so that every device and every process gets the same.

    Returns:
        The condition number of each widened factor, by layer name.

    Raises:
        InputError: a rank is lower than the present one, or larger than the factor can be orthogonal in.
    """
    layers = adapted_layers(model, adapter)
    for name, r in ranks.items():
        if not layers[name].r[adapter] <= r <= largest_rank(layers[name], adapter):
            raise InputError(
                f"rank {r} for {name} is out of range: it can be {layers[name].r[adapter]} to "
                f"{largest_rank(layers[name], adapter)}",
                code="out-of-range",
            )
    generator = torch.Generator().manual_seed(seed)
    conditions = {}
    for name, r in ranks.items():
        layer, old = layers[name], layers[name].r[adapter]
        shape_A, shape_B = layer.factor_shapes(r)
        A, B = layer.factor("A", adapter), layer.factor("B", adapter)
        if isinstance(layer, LoomEmbedding):
            new_A, new_B = _pad(A, shape_A), _widen(B.flatten(1).T, r, generator).T
            conditions[name] = _condition(new_B)
        else:
            new_A, new_B = _widen(A.flatten(1), r, generator), _pad(B, shape_B)
            conditions[name] = _condition(new_A)
        new: dict[Name, Tensor] = {"A": new_A.reshape(shape_A), "B": new_B.reshape(shape_B)}
        if (mixer := layer.optional_factor("mixer", adapter)) is not None:
            new["mixer"] = torch.eye(r)
            new["mixer"][:old, :old] = mixer
        for part_name, value in new.items():
            part: Any = layer.holder(part_name)[adapter]
            narrow = part.weight
            part.weight = nn.Parameter(value.to(narrow).contiguous(), requires_grad=narrow.requires_grad)
            replace_parameter(optimizer, narrow, part.weight, partial(_pad, shape=value.shape))
        for anchors, shape in ((layer.holder("anchor_A"), shape_A), (layer.holder("anchor_B"), shape_B)):
            if adapter in anchors:
                anchor: Any = anchors[adapter]
                anchor.weight = nn.Parameter(_pad(anchor.weight, shape), requires_grad=False)
        _set_rank(layer, adapter, r, cast(LoomConfig, model.peft_config[adapter]).use_rslora)
    _rewrite_config(model, adapter)
    return conditions


def average_gradients(model: PeftModel, adapter: str, names: Iterable[str]) -> None:
    """Average the gradients of these layers' A, B and mixers over all processes, as soon as backward has made them.

    For parameters that DistributedDataParallel does not know, because they were made after it. It is right for each of
    several micro-batches too: what was averaged before is the same everywhere, and its own average.
    """

    def average(parameter: Tensor) -> None:
        gradient = cast(Tensor, parameter.grad)
        dist.all_reduce(gradient)  # gloo has no ReduceOp.AVG
        gradient.div_(dist.get_world_size())

    layers = adapted_layers(model, adapter)
    for name in names:
        for parameter in factors(layers[name], adapter):
            parameter.register_post_accumulate_grad_hook(average)


def largest_rank(layer: LoomLayer, adapter: str) -> int:
    """The rank up to which new directions orthogonal to the old ones exist, and the checkpoint loads."""
    shape_A, shape_B = layer.factor_shapes(1)
    sizes = math.prod(shape_A), math.prod(shape_B)
    if adapter in layer.holder("anchor_A"):  # PiSSA and OLoRA take their factors from the base weight
        return min(sizes)
    return sizes[1] if isinstance(layer, LoomEmbedding) else sizes[0]


def _widen(factor: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """Rows (old, n) to (r, n): the new ones orthogonal to the old and to each other, of the old ones' size."""
    old, n = factor.shape
    rows = factor.detach().to("cpu", torch.float64)
    noise = torch.randn(n, r - old, generator=generator, dtype=torch.float64)
    # The first `old` columns of Q span the old rows; Householder's Q is orthonormal whatever their condition.
    Q = torch.linalg.qr(torch.cat([rows.T, noise], dim=1)).Q
    size = torch.linalg.vector_norm(rows) / math.sqrt(old)
    return torch.cat([rows, size * Q[:, old:].T])


def _condition(factor: Tensor) -> float:
    sigma = torch.linalg.svdvals(factor)
    return float(sigma.max() / sigma.min())


def _pad(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    """Zeros behind the old entries, along every axis that grows."""
    padded = torch.zeros(*shape, dtype=tensor.dtype, device=tensor.device)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded


def _set_rank(layer: LoomLayer, adapter: str, r: int, use_rslora: bool) -> None:
    """The new rank, with the alpha that leaves the scaling as it is."""
    alpha = alpha_of(layer.scaling[adapter], r, use_rslora)
    layer.r[adapter], layer.lora_alpha[adapter] = r, alpha
    layer.scaling[adapter] = scaling(r, alpha, use_rslora)


def _rewrite_config(model: PeftModel, adapter: str) -> None:
    """Let the configuration name exactly the layers, ranks and alphas that are there, so that a checkpoint reloads."""
    config: Any = model.peft_config[adapter]
    layers = adapted_layers(model, adapter)
    endings = tuple(f".{name}" for name in layers)
    others = {name for name, _ in model.get_base_model().named_modules()} - layers.keys()
    inside = tuple(f"{name}." for name in layers)
    config.target_modules = set(layers)
    # PEFT matches name endings: "proj" would also match "block.proj".
    config.exclude_modules = {name for name in others if name.endswith(endings) and not name.startswith(inside)} or None
    config.layers_to_transform = config.layers_pattern = None
    if config.init_lora_weights == "orthogonal":  # it accepts even ranks only; the values come from the checkpoint
        config.init_lora_weights = True
    for option, pattern, values in (
        ("r", "rank_pattern", {name: layer.r[adapter] for name, layer in layers.items()}),
        ("lora_alpha", "alpha_pattern", {name: layer.lora_alpha[adapter] for name, layer in layers.items()}),
    ):
        common = Counter(values.values()).most_common(1)[0][0]
        setattr(config, option, common)
        # Anchored, because PEFT matches endings here as well.
        setattr(config, pattern, {f"^{re.escape(name)}": v for name, v in values.items() if v != common})
    config.use_gate = any(gate(layer, adapter) is not None for layer in layers.values())
    adapted = (name for name, module in model.get_base_model().named_modules() if isinstance(module, LoomLayer))
    cast(LoomModel, model.base_model).targeted_module_names = list(adapted)
