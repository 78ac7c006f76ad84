"""Intruder dimensions, layer by layer, and what scaling them down costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.report.builders.modules import by_layer, finite
from loraloom.report.model import Fact, Point, Report, Scatter, Section, Table
from loraloom.report.scale import number


def intruder_report(
    layers: Mapping[str, Mapping[str, Any]],
    command: str,
    *,
    title: str,
    epsilon: float,
    top_k: int,
    sweep: Sequence[Mapping[str, float]] = (),
    task: str = "task metric",
    retention: str = "retention",
) -> Report:
    """Heatmaps of how much of an adapter is intruder, and the trade-off of a sweep where there is one.

    Args:
        layers: by module name a dict with `intruders` (list of indices among the top k), `cosines` (for each of the
            merged weight's top k left singular vectors the largest cosine with any of the base's), `relative_norm`
            (||dW|| / ||W||, Frobenius) and `effective_rank` (of dW); the last two may be missing or None.
        command: what was typed.
        title: of the page, such as the adapter's name.
        epsilon: a vector below this cosine is an intruder.
        top_k: how many singular vectors were looked at.
        sweep: for each scale a dict with `scale`, `task` and `retention`.
        task: name of the metric on the fine-tuned task.
        retention: name of the metric on what the base could do before.
    """
    counts = {name: float(len(layer["intruders"])) for name, layer in layers.items()}
    lowest = {name: min(layer["cosines"], default=None) for name, layer in layers.items()}
    touched = sum(count > 0 for count in counts.values())
    total = int(sum(counts.values()))
    worst = max(counts, key=lambda name: (counts[name], -(lowest[name] or 0.0)), default=None)
    sections = [
        Section(
            "Intruder dimensions",
            f"Of each module's top {top_k} left singular vectors after merging, how many have no cosine of {epsilon:g} "
            "or more with any of the base weight's.",
            by_layer(counts, f"intruders of {top_k}", low=0.0, high=float(max(1, *counts.values())) if counts else 1.0),
            _modules_table(layers),
        ),
        Section(
            "Lowest cosine",
            f"Of the same vectors the one least like the base: below {epsilon:g} it is an intruder.",
            by_layer(lowest, "lowest max cosine", low=0.0, high=1.0),
        ),
    ]
    for key, heading, unit, note in (
        ("relative_norm", "Size of the update", "‖ΔW‖ / ‖W‖", "Frobenius norms of the update and of the base weight."),
        ("effective_rank", "Effective rank", "effective rank", "Exponential of the entropy of ΔW's singular values."),
    ):
        values = {name: layer.get(key) for name, layer in layers.items()}
        if any(value is not None for value in values.values()):
            sections.append(Section(heading, note, by_layer(values, unit)))
    if sweep:
        sections.insert(0, trade_off_section(sweep, task, retention))
    return Report(
        title=title,
        command=command,
        lead=f"{total} intruder dimensions in {touched} of {len(layers)} modules."
        if total
        else f"No intruder dimension in {len(layers)} modules.",
        summary=[
            Fact("intruder dimensions", f"{total:,}", f"among the top {top_k} of each module"),
            Fact("modules with one", f"{touched} of {len(layers)}"),
            *([Fact("lowest cosine", number(min(v for v in lowest.values() if v is not None)))] if layers else []),
            *([Fact("most in one module", f"{counts[worst]:.0f}", worst)] if worst and total else []),
            Fact("epsilon", f"{epsilon:g}"),
        ],
        sections=sections,
    )


def trade_off_section(sweep: Sequence[Mapping[str, float]], task: str, retention: str) -> Section:
    """What is kept of the base against what is kept of the task, a point per scale.

    Args:
        sweep: for each scale a dict with `scale` (1 leaves the adapter as it is), `task` and `retention`.
        task: name of the metric on the fine-tuned task.
        retention: name of the metric on what the base could do before.
    """
    points = [Point(f"λ = {row['scale']:g}", row["retention"], row["task"]) for row in sweep]
    table = Table(["scale λ", task, retention], [[row["scale"], row["task"], row["retention"]] for row in sweep])
    note = "Intruder dimensions scaled by λ: 1 leaves the adapter as it is, 0 takes them out."
    return Section("Mitigation trade-off", note, Scatter(retention, task, points, connected=True), table)


def _modules_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    keys = [key for key in ("relative_norm", "effective_rank") if any(key in layer for layer in layers.values())]
    heads = {"relative_norm": "‖ΔW‖ / ‖W‖", "effective_rank": "effective rank"}
    rows = [
        [
            name,
            len(layer["intruders"]),
            finite(min(layer["cosines"], default=None)),
            *(finite(layer.get(key)) for key in keys),
        ]
        for name, layer in layers.items()
    ]
    return Table(["module", "intruders", "lowest cosine", *(heads[key] for key in keys)], rows)
