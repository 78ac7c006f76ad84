"""Intruder dimensions, layer by layer, and what scaling them down costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraloom.report.builders.modules import by_layer, finite
from loraloom.report.model import Cell, Fact, Lines, Point, Report, Scatter, Section, Series, Table
from loraloom.text import number

AMOUNTS = (
    ("relative_norm", "Size of the update", "‖ΔW‖ / ‖W‖", "Frobenius norms of the update and of the base weight."),
    ("effective_rank", "Effective rank", "effective rank", "Exponential of the entropy of ΔW's singular values."),
    ("error", "Lost to the rank", "relative error", "What the limited rank takes away of the mitigated update."),
)


def intruder_report(
    found: Mapping[str, Any], command: str, *, sweep: Sequence[Mapping[str, Any]] = (), title: str | None = None
) -> Report:
    """Heatmaps of how much of an adapter is intruder, and the trade-off of a sweep where there is one.

    Args:
        found: a dict with `adapter`, `top_k`, `epsilon` and `layers`, each a dict with `name`, `intruders` (indices
            among the top k), `cosines` (for each of the merged weight's top k left singular vectors the largest cosine
            with any of the base's), `exact` (False: the cosines are bounds) and, where known, `relative_norm`,
            `effective_rank` and `error`.
        command: what was typed.
        sweep: the points of a sweep, see `trade_off_section`.
        title: of the page; default: the name of the adapter.
    """
    layers, top_k, epsilon = found["layers"], found["top_k"], found["epsilon"]
    counts = {layer["name"]: float(len(layer["intruders"])) for layer in layers}
    lowest = {layer["name"]: finite(min(layer["cosines"], default=None)) for layer in layers}
    total, touched = int(sum(counts.values())), sum(count > 0 for count in counts.values())
    note = f"Of the same vectors the one least like the base: below {epsilon:g} it is an intruder."
    if not all(layer["exact"] for layer in layers):
        note += " Where the base weight was not decomposed, an intruder's cosine is an upper bound, any other a lower."
    sections = [trade_off_section(sweep)] if sweep else []
    sections += [
        Section(
            "Intruder dimensions",
            f"Of each module's top {top_k} left singular vectors after merging, how many have no cosine of {epsilon:g} "
            "or more with any of the base weight's.",
            by_layer(counts, f"intruders of {top_k}", low=0.0, high=max(1.0, *counts.values(), 1.0)),
            _modules_table(layers),
        ),
        Section("Lowest cosine", note, by_layer(lowest, "lowest cosine", low=0.0, high=1.0)),
    ]
    for key, heading, unit, explanation in AMOUNTS:
        values = {layer["name"]: layer.get(key) for layer in layers}
        if any(value is not None for value in values.values()):
            sections.append(Section(heading, explanation, by_layer(values, unit, low=0.0)))
    known = [value for value in lowest.values() if value is not None]
    worst = max(counts, key=lambda name: counts[name], default="")
    return Report(
        title=title or f"Intruder dimensions of {Path(found['adapter']).name}",
        command=command,
        lead=f"{total} intruder dimensions in {touched} of {len(layers)} modules."
        if total
        else f"No intruder dimension in {len(layers)} modules.",
        summary=[
            Fact("intruder dimensions", f"{total:,}", f"among the top {top_k} of each module"),
            Fact("modules with one", f"{touched} of {len(layers)}"),
            *([Fact("lowest cosine", number(min(known)))] if known else []),
            *([Fact("most in one module", f"{counts[worst]:.0f}", worst)] if total else []),
            Fact("epsilon", f"{epsilon:g}"),
            Fact("adapter", str(found["adapter"])),
        ],
        sections=sections,
    )


def trade_off_section(sweep: Sequence[Mapping[str, Any]]) -> Section:
    """What is kept of the base against what is kept of the task, a point per scale.

    Args:
        sweep: for each scale a dict with `scale` (1 leaves the adapter as it is), `metrics` (name to value: of the
            fine-tuned task first, of what the base could do before second; with one metric it is drawn over the scale)
            and `error` (what the limited rank lost).
    """
    names = list(dict.fromkeys(name for point in sweep for name in point["metrics"]))
    rows: list[list[Cell]] = [
        [point["scale"], *(finite(point["metrics"].get(name)) for name in names), finite(point["error"])]
        for point in sweep
    ]
    table = Table(["scale λ", *names, "lost to the rank"], rows)
    note = "Intruder dimensions scaled by λ: 1 leaves the adapter as it is, 0 takes them out."
    if len(names) < 2:
        drawn = names[0] if names else "lost to the rank"
        curve = Series(drawn, [point["scale"] for point in sweep], [row[1] for row in rows])  # type: ignore[misc]
        return Section("Mitigation", note, Lines("scale λ", drawn, [curve]), table)
    task, retention = names[:2]
    points = [
        Point(f"λ = {point['scale']:g}", point["metrics"][retention], point["metrics"][task])
        for point in sweep
        if finite(point["metrics"].get(task)) is not None and finite(point["metrics"].get(retention)) is not None
    ]
    return Section("Mitigation trade-off", note, Scatter(retention, task, points, connected=True), table)


def _modules_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    used = [amount for amount in AMOUNTS if any(layer.get(amount[0]) is not None for layer in layers)]
    rows: list[list[Cell]] = []
    for layer in layers:
        lowest = finite(min(layer["cosines"], default=None))
        rows.append([layer["name"], len(layer["intruders"]), lowest, *(finite(layer.get(key)) for key, *_ in used)])
    return Table(["module", "intruders", "lowest cosine", *(unit for _, _, unit, _ in used)], rows)
