"""Intruder dimensions of a whole adapter: finding them, a copy of the adapter with fewer, a merged model, a sweep.

Loops over :func:`loraloom.intruders.find.analyse_matrix` and the mitigation of its results. The adapter that is
analysed, the base model, heads, biases, and every random state stay as they are, bit for bit.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from loraloom.adapter.live import LiveAdapter, LiveModule
from loraloom.adapter.protocol import Parts
from loraloom.errors import InputError
from loraloom.intruders.adapter_copy import add_copy, copy_auxiliaries
from loraloom.intruders.copies import analyse_module, check_room, mitigated_copy
from loraloom.intruders.find import FINDING, LayerIntruders
from loraloom.intruders.reduce import Rank, Scope, check_options
from loraloom.intruders.report import IntruderReport, SweepPoint, SweepReport
from loraloom.intruders.rewind import plan_sweep, rewound_copy
from loraloom.intruders.solvers.basis import BasisCache
from loraloom.progress import Progress, silent, tracked


def find_intruders(
    model: PeftModel,
    adapter: str = "default",
    top_k: int = 10,
    epsilon: float = 0.5,
    *,
    bases: BasisCache | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> IntruderReport:
    """Looks for intruder dimensions in every layer of an adapter, and changes nothing.

    Args:
        model: with a LoRA adapter of PEFT's, or one of ours with any parts, on layers of any kind, quantised or not.
        adapter: its name.
        top_k: how many singular directions of each adapted weight to look at.
        epsilon: a direction with no cosine as large as this to the base weight's is an intruder.
        bases: decompose the base weights and keep that, for further adapters of the same base; then the report has
            exact cosines. ``BasisCache(cache_dir)`` keeps it on disk.
        device: where to compute; None is where each weight is.
        progress: is told of the modules analysed.

    Raises:
        ValueError: an argument is out of range, or the adapter is of another kind.
    """
    modules = LiveAdapter(model, adapter).modules.values()
    layers = [_analyse(module, top_k, epsilon, bases, device) for module in tracked(modules, FINDING, progress)]
    return IntruderReport(adapter, top_k, epsilon, layers)


def _analyse(
    module: LiveModule, top_k: int, epsilon: float, bases: BasisCache | None, device: str | torch.device | None
) -> LayerIntruders:
    W = module.weight() if device is None else module.weight().to(device)
    return analyse_module(module, W, None if bases is None else bases(W), top_k=top_k, epsilon=epsilon)


def reduce_intruders(
    model: PeftModel,
    adapter: str = "default",
    new_adapter: str = "intruders_reduced",
    scale: float = 0.75,
    scope: Scope = "top",
    rank: Rank = "exact",
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    bases: BasisCache | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> IntruderReport:
    """Adds a copy of an adapter in which intruder dimensions are scaled down.

    The new adapter has the parts of the old one (mixer, gate, magnitude, heads, ...) and is not made active: call
    ``model.set_adapter(new_adapter)``. Layers in which nothing is scaled get identical tensors.

    Args:
        model, adapter, top_k, epsilon, bases, device, progress: see :func:`find_intruders`.
        new_adapter: name of the copy.
        scale: what is left of each intruder: 1 changes nothing, 0 removes it, 0.7 to 0.9 is the paper's safe band.
        scope: "top", the paper's: the first intruder of each layer. "all": all of them.
        rank: "exact": each layer's rank grows by the intruders scaled in it, and the result is exact. "keep": ranks
            stay, and the report tells what that lost. A number: the rank of every layer.

    Returns:
        The report of :func:`find_intruders`, with the truncation error of each layer.

    Raises:
        ValueError: an argument is out of range, the name is taken, or the adapter is of another kind.
    """
    check_options(scale, scope, rank)
    if new_adapter in getattr(model, "peft_config", {}):
        raise ValueError(f"new_adapter={new_adapter!r} exists already: choose another name or delete it first.")
    check_room(LiveAdapter(model, adapter))
    found = find_intruders(model, adapter, top_k, epsilon, bases=bases, device=device, progress=progress)
    copies = _copies(model, found, scale, scope, rank)
    add_copy(model, adapter, new_adapter, {name: r for name, (_, r, _) in copies.items()})
    _store(model, adapter, new_adapter, copies)
    errors = {name: error for name, (_, _, error) in copies.items()}
    return replace(found, scale=scale, scope=scope, rank=rank, errors=errors)


def merge_with_reduced_intruders(
    model: PeftModel,
    adapter: str = "default",
    scale: float = 0.75,
    scope: Scope = "top",
    *,
    quantized: Literal["requantize", "dequantize"] | None = None,
    **options: Any,
) -> tuple[nn.Module, IntruderReport]:
    """Merges an adapter into the base model with its intruders scaled down: no rank limits it.

    Like PEFT's ``merge_and_unload`` it consumes the model: the base weights are changed and the adapters are gone.

    Args:
        model, adapter, scale, scope: see :func:`reduce_intruders`.
        quantized: needed where adapted layers are quantised. "requantize" quantises the merged weights anew;
            "dequantize" replaces these layers by nn.Linear with the merged weight in the dtype that it dequantises to.
        **options: of :func:`find_intruders`.

    Returns:
        The base model, merged, and the report.

    Raises:
        ValueError: an argument is out of range, or layers are quantised and ``quantized`` is not given.
    """
    source = LiveAdapter(model, adapter)
    _check_mergeable(source)
    layers = [module for module in source.modules.values() if module.quantized]
    if layers and quantized not in ("requantize", "dequantize"):
        raise ValueError(
            f"quantized={quantized!r}, but {layers[0].name} and {len(layers) - 1} more layers are quantised: choose "
            "'requantize' (rounds the merged weight) or 'dequantize' (keeps it, in a layer that takes more memory)."
        )
    name = _free_name(model)
    report = reduce_intruders(model, adapter, name, scale, scope, "exact", **options)
    dense: dict[str, nn.Linear] = {}
    if quantized == "dequantize":
        modules = LiveAdapter(model, name).modules
        dense = {path: _dense(module) for path, module in modules.items() if module.quantized}
    model.set_adapter(name)
    tuner: Any = model.base_model
    merged = tuner.merge_and_unload()
    for path, linear in dense.items():
        merged.set_submodule(path, linear)
    return merged, report


def sweep_intruders(
    model: PeftModel,
    adapter: str,
    scales: Iterable[float],
    evaluate: Callable[[PeftModel], Mapping[str, float]],
    *,
    scope: Scope = "top",
    rank: Rank = "exact",
    rewind: bool = False,
    **options: Any,
) -> SweepReport:
    """Evaluates an adapter with its intruders at several scales. The search is done once; a scale costs milliseconds.

    Args:
        model, adapter, scope, rank: see :func:`reduce_intruders`.
        scales: the scales, in the order in which to try them. At 1 the adapter itself is evaluated.
        evaluate: called with the model for each scale, with the mitigated adapter active; returns named numbers, such
            as a task metric and a loss on something that should not be forgotten.
        rewind: evaluate ``W + t dW`` at the same numbers as well, the control for what scaling intruders does; 1 comes
            once, also where it is not asked for. Trained heads, biases of the model and tokens stay as they are.
        **options: of :func:`find_intruders`.

    Returns:
        One point per scale, those of rewinding last. The model is as it was before.
    """
    plan = plan_sweep(scales, scope, rank, rewind)
    tuner: Any = model.base_model
    found = find_intruders(model, adapter, **options)
    before = list(model.active_adapters), {name: p.requires_grad for name, p in model.named_parameters()}
    names: dict[bool, str] = {}  # of the copies, by whether they are rewound: their ranks differ
    points = []
    try:
        for scale, rewound in plan:
            error, name = 0.0, adapter
            if scale != 1:
                copies = _rewound(model, adapter, scale) if rewound else _copies(model, found, scale, scope, rank)
                if rewound not in names:
                    names[rewound] = _free_name(model)
                    add_copy(model, adapter, names[rewound], {key: r for key, (_, r, _) in copies.items()})
                name = names[rewound]
                _store(model, adapter, name, copies)
                error = max((error for _, _, error in copies.values()), default=0.0)
            model.set_adapter(name)
            points.append(SweepPoint(scale, dict(evaluate(model)), error, rewound))
    finally:
        active, trainable = before
        model.set_adapter(active[0])
        for name in names.values():
            model.delete_adapter(name)
        tuner.set_adapter(active)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[key])
    return SweepReport(replace(found, scope=scope, rank=rank), points)


def _check_mergeable(adapter: LiveAdapter) -> None:
    """What PEFT's merge would do wrongly."""
    if adapter.config.get("layer_replication"):
        raise InputError(
            f"{adapter.where} has layer_replication, whose layers share one weight: it takes one update only",
            code="altered-base",
        )
    for name, module in adapter.modules.items():
        if adapter.kind == "LORA" and module.magnitude() is not None and not module.adapted_weight().any(1).all():
            raise InputError(
                f"{name} has a row of zeros, by whose norm PEFT's DoRA divides: use reduce_intruders, save the "
                "adapter, and loraloom merge",
                code="zero-row",
            )


def _free_name(model: PeftModel) -> str:
    return next(n for i in range(len(model.peft_config) + 1) if (n := f"mitigated_{i}") not in model.peft_config)


@torch.no_grad()
def _copies(
    model: PeftModel, found: IntruderReport, scale: float, scope: Scope, rank: Rank
) -> dict[str, tuple[Parts, int, float]]:
    """By layer: the parts of the mitigated copy, its rank, and the error."""
    by_name = {layer.name: layer for layer in found.layers}
    return {
        name: mitigated_copy(module, by_name[name], scale, scope, rank)
        for name, module in LiveAdapter(model, found.adapter).modules.items()
    }


def _rewound(model: PeftModel, adapter: str, t: float) -> dict[str, tuple[Parts, int, float]]:
    """The same for the rewound adapter."""
    modules = LiveAdapter(model, adapter).modules
    return {name: (rewound_copy(module, t), module.rank, 0.0) for name, module in modules.items()}


def _store(model: PeftModel, adapter: str, new_adapter: str, copies: dict[str, tuple[Parts, int, float]]) -> None:
    for name, module in LiveAdapter(model, adapter).modules.items():
        module.store(new_adapter, copies[name][0])
    copy_auxiliaries(model, adapter, new_adapter)


def _dense(module: LiveModule) -> nn.Linear:
    W = module.weight()
    base, weight = module.layer.get_base_layer(), module.update().adapted_weight(W).to(W.dtype)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return linear
