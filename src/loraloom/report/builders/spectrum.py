"""Intruder dimensions, layer by layer, and what scaling them down costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.report.builders.modules import by_layer, finite, metric_name
from loraloom.report.model import Cell, Fact, Lines, Point, Report, Scatter, Section, Series, Table
from loraloom.text import number

if TYPE_CHECKING:
    from loraloom.intruders.report import IntruderReport, SweepPoint

KEPT = "retention_"  # how the metrics of data.retention begin
# What the files of an adapter tell about a scale, without a model.
OF_FILES = {"relative_change": "relative change of ΔW", "remaining_intruders": "intruders left"}
AMOUNTS = (
    ("relative_norm", "Size of the update", "‖ΔW‖ / ‖W‖", "Frobenius norms of the update and of the base weight."),
    ("effective_rank", "Effective rank", "effective rank", "Exponential of the entropy of ΔW's singular values."),
)
ERROR = ("Lost to the rank", "relative error", "What the limited rank takes away of the mitigated update.")


def intruder_report(
    found: "IntruderReport", command: str, *, sweep: "Sequence[SweepPoint]" = (), title: str | None = None
) -> Report:
    """Heatmaps of how much of an adapter is intruder, and the trade-off of a sweep where there is one.

    Args:
        found: the intruders of an adapter.
        command: what was typed.
        sweep: the points of a sweep, see `trade_off_section`.
        title: of the page; default: the name of the adapter.
    """
    layers, top_k, epsilon = found.layers, found.top_k, found.epsilon
    counts = {layer.name: float(len(layer.intruders)) for layer in layers}
    lowest = {layer.name: finite(min(layer.cosines, default=None)) for layer in layers}
    total, touched = int(sum(counts.values())), sum(count > 0 for count in counts.values())
    note = f"Lowest cosine among the same vectors: below {epsilon:g} it is an intruder's."
    if not all(layer.exact for layer in layers):
        note += (
            " Where the base weight was not decomposed, cosines are upper bounds for intruders and lower bounds for "
            "the rest."
        )
    sections = [trade_off_section(sweep)] if sweep else []
    sections += [
        Section(
            "Intruder dimensions",
            f"Number of each merged weight's top {top_k} left singular vectors whose cosine with every one of the base "
            f"weight's is below {epsilon:g}.",
            by_layer(counts, f"intruders of {top_k}", low=0.0, high=max(1.0, *counts.values(), 1.0)),
            _modules_table(found),
        ),
        Section("Lowest cosine", note, by_layer(lowest, "lowest cosine", low=0.0, high=1.0)),
    ]
    for key, heading, unit, explanation in AMOUNTS:
        values = {layer.name: getattr(layer, key) for layer in layers}
        if any(value is not None for value in values.values()):
            sections.append(Section(heading, explanation, by_layer(values, unit, low=0.0)))
    if found.errors:
        heading, unit, explanation = ERROR
        sections.append(Section(heading, explanation, by_layer(found.errors, unit, low=0.0)))
    known = [value for value in lowest.values() if value is not None]
    worst = max(counts, key=lambda name: counts[name], default="")
    return Report(
        title=title or f"Intruder dimensions of {Path(found.adapter).name}",
        command=command,
        lead=f"{total} intruder dimensions in {touched} of {len(layers)} modules."
        if total
        else f"No intruder dimension in {len(layers)} modules.",
        summary=[
            Fact("intruder dimensions", f"{total:,}", f"among the top {top_k} of each module"),
            Fact("modules with one", f"{touched} of {len(layers)}"),
            *([Fact("lowest cosine", number(min(known), digits=2))] if known else []),
            *([Fact("most in one module", f"{counts[worst]:.0f}", worst)] if total else []),
            Fact("epsilon", f"{epsilon:g}"),
            Fact("adapter", found.adapter),
        ],
        sections=sections,
    )


def trade_off_section(sweep: "Sequence[SweepPoint]") -> Section:
    """Retention against the task, a point per scale; over the scale where only one of them was measured.

    Args:
        sweep: points whose `metrics` are the task's and, with the prefix `retention_`, the same of data.retention; and
            those of `OF_FILES`, which are drawn against each other where nothing else was measured.
    """
    names = list(dict.fromkeys(name for point in sweep for name in point.metrics))
    if "loss" in names:  # the same number twice
        names = [name for name in names if not name.endswith("perplexity")]
    measured = [name for name in names if name not in OF_FILES]
    task = next((name for name in measured if not name.startswith(KEPT)), None)
    kept = None if task is None else next((name for name in measured if name == KEPT + task), None)
    if not measured and set(OF_FILES) <= set(names):
        task, kept = OF_FILES
    lossy = any(point.error for point in sweep)
    heads = [*map(_heading, names), *(["lost to the rank"] if lossy else [])]
    rows: list[list[Cell]] = []
    for point in sweep:
        values = [finite(point.metrics.get(name)) for name in names]
        rows.append([point.scale, *values, *([finite(point.error)] if lossy else [])])
    rewinds = any(point.rewound for point in sweep)
    if rewinds:
        rows = [[_group(point) or "adapter", *row] for point, row in zip(sweep, rows, strict=True)]
    table = Table([*(["what is scaled"] if rewinds else []), "scale λ", *heads], rows)
    note = "Intruder dimensions scaled by λ: 1 leaves the adapter as it is, 0 takes them out."
    if rewinds:
        note += " Rewinding scales all of ΔW, so that 0 is the base: what intruders are worth shows between the curves."
    if task is None or kept is None:
        drawn = "lost to the rank" if task is None else _heading(task)
        curves = []
        for name, own in _curves(sweep).items():
            y = [finite(point.error if task is None else point.metrics.get(task)) for point in own]
            curves.append(Series(name or drawn, [point.scale for point in own], y))
        return Section("Mitigation", note, Lines("scale λ", drawn, curves), table)
    points = [
        Point(f"λ = {point.scale:g}" if i == 0 or _group(point) else "", point.metrics[kept], point.metrics[task], name)
        for i, (name, own) in enumerate(_curves(sweep).items())
        for point in own
        if finite(point.metrics.get(task)) is not None and finite(point.metrics.get(kept)) is not None
    ]
    figure = Scatter(_heading(kept), _heading(task), points, connected=True)
    return Section("Mitigation trade-off", note, figure, table)


def _group(point: "SweepPoint") -> str:
    return "" if point.scale == 1 else "all of ΔW (rewinding)" if point.rewound else "intruders"


def _curves(sweep: "Sequence[SweepPoint]") -> "dict[str, list[SweepPoint]]":
    """By name, in the order of the scales; the adapter itself is on both. One without a name where nothing rewinds."""
    if not any(point.rewound for point in sweep):
        return {"": list(sweep)}
    names = list(dict.fromkeys(name for point in sweep if (name := _group(point))))
    curves = {name: [point for point in sweep if _group(point) in ("", name)] for name in names}
    return {name: sorted(own, key=lambda point: -point.scale) for name, own in curves.items()}


def _heading(metric: str) -> str:
    """ "retention_accuracy" as "accuracy, retention set", "loss" as "loss, task"."""
    name = metric_name(metric.removeprefix(KEPT))
    return OF_FILES.get(metric) or f"{name}, {'retention set' if metric.startswith(KEPT) else 'task'}"


def _modules_table(found: "IntruderReport") -> Table:
    used = [(key, unit) for key, _, unit, _ in AMOUNTS if any(getattr(x, key) is not None for x in found.layers)]
    rows: list[list[Cell]] = []
    for layer in found.layers:
        amounts = [finite(getattr(layer, key)) for key, _ in used]
        error = [finite(found.errors.get(layer.name))] if found.errors else []
        rows.append([layer.name, len(layer.intruders), finite(min(layer.cosines, default=None)), *amounts, *error])
    heads = ["module", "intruders", "lowest cosine", *(unit for _, unit in used), *([ERROR[1]] if found.errors else [])]
    return Table(heads, rows)
