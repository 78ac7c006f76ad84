"""Methods side by side: the metric with its spread, and what each costs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.report.builders.modules import finite
from loraloom.report.model import Bars, Cell, Fact, Lines, Report, Section, Series, Table
from loraloom.text import number

LEARNING_RATE = "training.learning_rate"
COSTS = (
    ("peak_memory_bytes", "Peak memory", "peak memory", "bytes", "The largest of the method's runs."),
    ("wall_time_seconds", "Wall time", "seconds", "s", "Mean over the method's runs."),
    ("tokens_per_second", "Speed of training", "tokens per second", "tokens/s", "Mean over the method's runs."),
    ("trainable_parameters", "Trainable parameters", "parameters", "", "Frozen ones are not counted."),
    ("retention", "Retention", "metric on the retention set", "", "What is left of what the base could do before."),
)


def comparison_report(comparison: Mapping[str, Any], command: str) -> Report:
    """The page of `loraloom compare`.

    Args:
        comparison: comparison.json. Of each of `methods`: `label`, `best` and `candidates` (each with `point`, `values`
            by seed, `mean` and `spread`), `versus_baseline` (with `difference` and p values, or null), the costs
            `trainable_parameters`, `peak_memory_bytes`, `tokens_per_second` and `wall_time_seconds`, `retention`, and
            `failed`, the number of runs without a result. And `metric`, `lower_is_better`, `baseline`, `seeds`,
            `notes`, `runs`.
        command: what was typed.
    """
    methods, metric = comparison["methods"], comparison["metric"].replace("_", " ")
    best = [method["best"] for method in methods]
    labels = [method["label"] for method in methods]
    finished = [(m["label"], m["best"]["mean"]) for m in methods if m["best"] is not None]
    errors = [b["spread"] if b is not None else None for b in best]
    bars = Bars(
        f"{metric}, mean over seeds",
        labels,
        [None if b is None else finite(b["mean"]) for b in best],
        errors if any(error is not None for error in errors) else None,
        from_zero=False,
    )
    seeds = len(comparison["seeds"])
    sections = [
        Section(
            metric.capitalize(),
            f"Each method at its best point, {_counted(seeds, 'seed')}; ± is one standard deviation over the seeds. "
            f"{'Lower' if comparison['lower_is_better'] else 'Higher'} is better.",
            bars,
            _table(comparison, metric),
        ),
        *_rates(methods, metric),
    ]
    for key, title, label, unit, note in COSTS:
        values = [finite(method[key]) for method in methods]
        if any(values):
            sections.append(Section(title, note, Bars(label, labels, values, unit=unit)))
    if comparison.get("notes"):
        sections.insert(1, Section("Before you believe it", table=Table(["note"], [[n] for n in comparison["notes"]])))
    failures = [run for run in comparison.get("runs", []) if run["result"] is None]
    if failures:
        rows: list[list[Cell]] = [
            [run["label"], json.dumps(run["point"]), run["seed"], run["error"]] for run in failures
        ]
        sections.append(Section("Runs without a result", table=Table(["method", "point", "seed", "error"], rows)))
    return Report(
        title=f"{len(methods)} methods compared by {metric}",
        command=command,
        lead=_lead(finished, metric, comparison["lower_is_better"]),
        summary=[
            *(
                Fact(label, number(mean), "baseline" if label == comparison["baseline"] else "")
                for label, mean in finished
            ),
            Fact("task", str(comparison["task"])),
            Fact("seeds", ", ".join(map(str, comparison["seeds"]))),
            Fact("folder", str(comparison["folder"])),
        ],
        sections=sections,
    )


def _lead(finished: Sequence[tuple[str, float]], metric: str, lower_is_better: bool) -> str:
    if not finished:
        return "No run has finished."
    ordered = sorted(finished, key=lambda pair: pair[1], reverse=not lower_is_better)
    name, mean = ordered[0]
    rest = f", ahead of {ordered[1][0]} with {number(ordered[1][1])}" if len(ordered) > 1 else ""
    return f"{name} has the best mean {metric}, {number(mean)}{rest}."


def _rates(methods: Sequence[Mapping[str, Any]], metric: str) -> list[Section]:
    """The metric over the learning rate, where more than one was tried."""
    series = []
    for method in methods:
        points = sorted(
            (float(c["point"][LEARNING_RATE]), finite(c["mean"]))
            for c in method["candidates"]
            if LEARNING_RATE in c["point"]
        )
        if len({rate for rate, _ in points}) > 1:
            series.append(Series(method["label"], [rate for rate, _ in points], [mean for _, mean in points]))
    if not series:
        return []
    note = "Mean over the seeds that finished, for each rate that was tried."
    return [Section("Learning rates", note, Lines("learning rate", metric, series, log_x=True))]


def _table(comparison: Mapping[str, Any], metric: str) -> Table:
    rows: list[list[Cell]] = []
    rates = all(set(m["best"]["point"]) == {LEARNING_RATE} for m in comparison["methods"] if m["best"] is not None)
    for method in comparison["methods"]:
        best, versus = method["best"], method["versus_baseline"]
        rows.append(
            [
                method["label"],
                None if best is None else finite(best["mean"]),
                None if best is None else finite(best["spread"]),
                None if best is None else _point(best["point"]),
                None if versus is None else finite(versus["difference"]),
                None if versus is None else finite(versus["p_t"]),
                method["trainable_parameters"],
                number(method["peak_memory_bytes"], "bytes") if method["peak_memory_bytes"] else None,
                finite(method["tokens_per_second"]),
                finite(method["wall_time_seconds"]),
                finite(method["retention"]),
                method["failed"],
            ]
        )
    heads = [
        "method",
        metric,
        "±",
        "learning rate" if rates else "best point",
        f"vs {comparison['baseline']}",
        "p (t test)",
        "trainable parameters",
    ]
    heads += ["peak memory", "tokens/s", "seconds", "retention", "failed"]
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] is not None for row in rows)]
    return Table([heads[i] for i in used], [[row[i] for i in used] for row in rows])


def _point(point: Mapping[str, Any]) -> Cell:
    """The learning rate alone as a number, else every key with its value."""
    if set(point) == {LEARNING_RATE}:
        return point[LEARNING_RATE]
    shown = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in point.items()}
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in shown.items())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
