"""Intruder dimensions of an adapter in files, found and scaled down one module at a time: no model is built.

A module's base weight is read, analysed and let go before the next one: beside the adapter, memory holds about two
matrices of the largest module, as it is stored and in float32. Where a decomposition of it is needed (see
:func:`loraloom.intruders.find.analyse_matrix`) that takes some more, in float64.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loraloom.adapter.open import open_stored
from loraloom.adapter.protocol import AdaptedModule
from loraloom.adapter.serving import serving_rows
from loraloom.adapter.stored import CONFIG, WEIGHTS, StoredAdapter
from loraloom.card import write_card
from loraloom.errors import InputError
from loraloom.intruders.card import intruders_card
from loraloom.intruders.copies import analyse_module, check_room, mitigated_copy, patterns
from loraloom.intruders.find import FINDING, LayerIntruders, analyse_matrix
from loraloom.intruders.reduce import Rank, Scope, check_options
from loraloom.intruders.report import IntruderReport, SweepPoint, SweepReport
from loraloom.intruders.rewind import plan_sweep, rewound_matrix
from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, squared_norms
from loraloom.intruders.solvers.topk import Triplets
from loraloom.io.files import check_apart, folder_atomically
from loraloom.io.stream import save_tensors
from loraloom.progress import Progress, silent, tracked
from loraloom.update.lowrank import factored_svd


def find_stored_intruders(
    path: str | Path,
    base: str | Path | None = None,
    top_k: int = 10,
    epsilon: float = 0.5,
    *,
    progress: Progress = silent,
) -> IntruderReport:
    """:func:`loraloom.intruders.live.find_intruders` for an adapter in files.

    The report has the same numbers, without the singular vectors, which of a large model are many.

    Args:
        path: the adapter's folder, or a repository of the hub.
        base: folder or repository of the base model; None: the one that the adapter's configuration names.
        top_k, epsilon: see :func:`loraloom.intruders.live.find_intruders`.
        progress: is told of the modules analysed.

    Raises:
        InputError: a file is missing or broken, the base is another one or quantised, or a tensor is not finite.
        ValueError: top_k or epsilon is out of range.
    """
    adapter = _open(path, base)
    modules = tracked(adapter.modules.values(), FINDING, progress)
    found = [_without_vectors(_analyse(module, top_k, epsilon)) for module in modules]
    return IntruderReport(str(adapter.path), top_k, epsilon, found)


def reduce_stored_intruders(
    path: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    scale: float = 0.75,
    scope: Scope = "top",
    rank: Rank = "exact",
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    overwrite: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> IntruderReport:
    """Writes a copy of an adapter in files in which intruder dimensions are scaled down.

    The copy has the type and the parts of the original. Tensors of modules in which nothing is scaled, heads, biases
    and tokens are bit-identical. Ranks that changed are in its rank_pattern, with the alphas that keep the scales.

    Args:
        path, base, top_k, epsilon, progress: see :func:`find_stored_intruders`.
        out: the new folder; it appears when everything is written.
        scale, scope, rank: see :func:`loraloom.intruders.live.reduce_intruders`.
        overwrite: replace ``out``, if it is not the adapter's own folder.
        command: what was typed, for the model card.

    Returns:
        The report of :func:`find_stored_intruders`, with the truncation error of each module.

    Raises:
        InputError: also where ``out`` has something in it, or the adapter is a composition, which has no room.
        ValueError: an option is out of range.
    """
    check_options(scale, scope, rank)
    adapter = _open(path, base)
    assert adapter.base is not None
    check_room(adapter)
    check_apart(Path(out), [adapter.path, adapter.base.checkpoint.path])
    # What PEFT saves again of modules_to_save stays; of a tied table, whose update changes, one copy is enough.
    again = [key for key in adapter.twice if ".modules_to_save." in key or ".original_module." in key]
    tensors = dict(adapter.checkpoint.tensors([*adapter.others, *again]))
    found: list[LayerIntruders] = []
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    with folder_atomically(Path(out), overwrite) as folder:
        for module in tracked(adapter.modules.values(), FINDING, progress):
            analysed = _analyse(module, top_k, epsilon)
            parts, ranks[module.name], errors[module.name] = mitigated_copy(module, analysed, scale, scope, rank)
            tensors |= {module.tensors[part]: tensor.contiguous() for part, tensor in parts.items()}
            found.append(_without_vectors(analysed))
        config = _resized(adapter, ranks)
        save_tensors(folder / WEIGHTS, {key: tensors[key] for key in adapter.checkpoint if key in tensors})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        report = IntruderReport(str(adapter.path), top_k, epsilon, found, scale, scope, rank, errors)
        write_card(intruders_card(report, str(out), adapter, serving_rows(folder, out), command), folder)
    return report


def sweep_stored(
    path: str | Path,
    scales: Sequence[float],
    base: str | Path | None = None,
    scope: Scope = "top",
    rank: Rank = "exact",
    *,
    rewind: bool = False,
    top_k: int = 10,
    epsilon: float = 0.5,
    progress: Progress = silent,
) -> SweepReport:
    """What each scale would take away of an adapter in files. What that does to a task takes a model, and its data.

    A point's metrics are ``relative_change``, ``||dW' - dW|| / ||dW||`` over all modules, with dW the change of the
    base weight and dW' the mitigated one, and ``remaining_intruders`` among the top_k of every module: a scaled
    intruder can drop out of the top k; the next direction takes its place and may be an intruder too.

    Args:
        path, base, top_k, epsilon, progress: see :func:`find_stored_intruders`.
        scales: in the order of the points.
        scope, rank: see :func:`loraloom.intruders.live.reduce_intruders`.
        rewind: the same of ``W + t dW``, see :func:`loraloom.intruders.live.sweep_intruders`. The intruders of each are
            looked for anew.

    Raises:
        InputError: as :func:`find_stored_intruders`; a composition has no rank but "exact".
        ValueError: an option is out of range.
    """
    plan = plan_sweep(scales, scope, rank, rewind)
    adapter = _open(path, base)
    if rank != "exact":
        check_room(adapter)
    found: list[LayerIntruders] = []
    norm, lost = 0.0, 0.0  # squared, and for a scale of 0
    remaining, errors = [0] * len(plan), [0.0] * len(plan)
    for module in tracked(adapter.modules.values(), FINDING, progress):
        # No scale can bring up more than top_k directions from further down.
        more = _analyse(module, 2 * top_k, epsilon)
        first = _first(more, top_k)
        scaled = first.intruders[:1] if scope == "top" else first.intruders
        norm += _change(module, first)
        lost += sum(first.singular_values[i] ** 2 for i in scaled)
        for i, (scale, rewound) in enumerate(plan):
            remaining[i] += (
                _rewound_count(module, scale, top_k, epsilon) if rewound else _remaining(more, top_k, scaled, scale)
            )
            if rank != "exact" and not rewound:
                errors[i] = max(errors[i], mitigated_copy(module, first, scale, scope, rank)[2])
        found.append(_without_vectors(first))
    share = math.sqrt(lost / norm) if norm else 0.0
    points = [
        SweepPoint(
            scale,
            {"relative_change": abs(scale - 1) * (1 if rewound else share), "remaining_intruders": left},
            error,
            rewound,
        )
        for (scale, rewound), left, error in zip(plan, remaining, errors, strict=True)
    ]
    return SweepReport(IntruderReport(str(adapter.path), top_k, epsilon, found, scope=scope, rank=rank), points)


def _open(path: str | Path, base: str | Path | None) -> StoredAdapter:
    base = base or open_stored(path).config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"{Path(path) / CONFIG} names no base model: give its folder", code="no-base")
    return open_stored(path, base)


def _analyse(module: AdaptedModule, top_k: int, epsilon: float) -> LayerIntruders:
    return analyse_module(module, module.weight(), top_k=top_k, epsilon=epsilon)


def _rewound_count(module: AdaptedModule, t: float, top_k: int, epsilon: float) -> int:
    """Intruders of ``W + t dW``."""
    if not t:
        return 0
    W, (A, B) = module.weight(), module.factors()
    B, magnitude = rewound_matrix(W, A, B, module.magnitude(), t)
    return len(analyse_matrix(W, A, B, magnitude, top_k=top_k, epsilon=epsilon).intruders)


def _first(found: LayerIntruders, k: int) -> LayerIntruders:
    """What was found among the first k directions."""
    q = sum(i < k for i in found.intruders)
    U, S, Vh, error = found.vectors
    return replace(
        found,
        singular_values=found.singular_values[:k],
        cosines=found.cosines[:k],
        intruders=found.intruders[:q],
        vectors=Triplets(U[:, :q], S[:q], Vh[:q], error[:q]),
    )


def _without_vectors(found: LayerIntruders) -> LayerIntruders:
    out, width = found.shape
    nothing = Triplets(torch.empty(out, 0), torch.empty(0), torch.empty(0, width), torch.empty(0))
    return replace(found, vectors=nothing, row_scale=None)


def _change(module: AdaptedModule, found: LayerIntruders) -> float:
    """``||W' - W||^2``."""
    if found.relative_norm is None:  # W = 0
        return float(factored_svd(*module.factors())[1].double().square().sum())
    return found.relative_norm**2 * float(squared_norms(module.weight()).double().sum())


def _remaining(found: LayerIntruders, top_k: int, scaled: list[int], scale: float) -> int:
    """Intruders among the top_k directions of the mitigated weight: it has the same ones, in another order."""
    values = [s * scale if i in scaled else s for i, s in enumerate(found.singular_values)]
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top_k]
    return sum(i in found.intruders and values[i] > RELATIVE_ZERO * values[order[0]] for i in order)


def _resized(adapter: StoredAdapter, ranks: dict[str, int]) -> dict:
    """The configuration of a copy with these ranks."""
    config, modules = adapter.config, adapter.modules.values()
    if all(ranks[module.name] == module.rank for module in modules):
        return config
    config = config | patterns(modules, ranks, bool(config.get("use_rslora")))
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] not in ("pissa", "olora"):
        config["init_lora_weights"] = True  # others look at data, or cannot start with other ranks
    return config
