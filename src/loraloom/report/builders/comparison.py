"""Methods side by side: what each seed reached, how it got there, and what each method costs."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.report.builders.configuration import configurations_section
from loraloom.report.builders.modules import finite, metric_name
from loraloom.report.model import Bars, Cell, Fact, Lines, Report, Section, Series, Table
from loraloom.text import number
from loraloom.training.compare.config import LEARNING_RATE
from loraloom.training.compare.runs import describe
from loraloom.training.compare.verdict import verdict

if TYPE_CHECKING:
    from loraloom.training.compare.execution import Outcome
    from loraloom.training.compare.results import Comparison, MethodResult
    from loraloom.training.config import RunConfig

STATE = "trainer_state.json"
PER_RUN = ("output.dir", "output.overwrite", "training.seed")


def comparison_report(comparison: "Comparison", command: str) -> Report:
    """The page of `loraloom compare`. Curves are read from the folders of the runs, where those are still there."""
    metric = metric_name(comparison.metric)
    finished = [method for method in comparison.methods if method.best is not None]
    sections = [
        Section("Results", _how_to_read(comparison), _results(comparison), _table(comparison)),
        _curves(comparison),
        _rates(comparison.methods, metric),
    ]
    if comparison.notes:
        notes: list[list[Cell]] = [[note] for note in comparison.notes]
        sections.insert(1, Section("Before you believe it", table=Table(["note"], notes)))
    failures = [outcome for outcome in comparison.outcomes if outcome.result is None]
    if failures:
        rows: list[list[Cell]] = [[o.run.label, describe(o.run.point), o.run.seed, o.error] for o in failures]
        sections.append(Section("Runs without a result", table=Table(["method", "point", "seed", "error"], rows)))
    configs = _configs(comparison)
    if configs:
        sections.append(configurations_section(configs, PER_RUN))
    return Report(
        title=f"{len(comparison.methods)} methods compared by {metric}",
        command=command,
        lead=verdict(comparison),
        summary=[
            *(_fact(method, comparison.baseline) for method in finished),
            Fact("task", comparison.task),
            Fact("seeds", ", ".join(map(str, comparison.seeds))),
            Fact("folder", comparison.folder),
        ],
        sections=[section for section in sections if section.figure or section.table],
    )


def _fact(method: "MethodResult", baseline: str) -> Fact:
    assert method.best is not None
    spread = "" if method.best.spread is None else f"± {number(method.best.spread, digits=2)}"
    role = "the baseline" if method.label == baseline else ""
    return Fact(method.label, number(method.best.mean), ", ".join(filter(None, (spread, role))))


def _how_to_read(comparison: "Comparison") -> str:
    count = len(comparison.seeds)
    side = "Lower" if comparison.lower_is_better else "Higher"
    return (
        f"{metric_name(comparison.metric).capitalize()} on the test set, each method at its best point: a ring for "
        f"each of {count} seeds, a dot for their mean, whiskers of one standard deviation. {side} is better."
    )


def _results(comparison: "Comparison") -> Bars:
    best = [method.best for method in comparison.methods]
    errors = [None if one is None else one.spread for one in best]
    return Bars(
        metric_name(comparison.metric),
        [method.label for method in comparison.methods],
        [None if one is None else finite(one.mean) for one in best],
        errors if any(error is not None for error in errors) else None,
        from_zero=False,
        samples=[[] if one is None else [v for v in one.values.values() if finite(v) is not None] for one in best],
    )


def _table(comparison: "Comparison") -> Table:
    """What the figure does not say: the tests, and what each method costs."""
    rows: list[list[Cell]] = []
    for method in comparison.methods:
        best, test = method.best, method.versus_baseline
        rows.append(
            [
                method.label,
                None if best is None else describe(best.point),
                None if test is None else finite(test.difference),
                None if test is None else finite(test.p_sign_flip),
                None if test is None else finite(test.p_t),
                method.trainable_parameters,
                number(method.peak_memory_bytes, "bytes") if method.peak_memory_bytes else None,
                None if method.tokens_per_second is None else number(method.tokens_per_second, digits=3),
                None if method.wall_time_seconds is None else f"{method.wall_time_seconds:.0f} s",
                _retention(method),
                method.failed or None,
            ]
        )
    heads = ["method", "best point", f"minus {comparison.baseline}", "p, exact", "p, t test", "trained parameters"]
    heads += ["peak memory", "tokens/s", "time", "retention set, before → after", "failed runs"]
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] is not None for row in rows)]
    return Table([heads[i] for i in used], [[row[i] for i in used] for row in rows])


def _retention(method: "MethodResult") -> str | None:
    if method.retention is None or method.retention_before is None:
        return None
    return f"{number(method.retention_before)} → {number(method.retention)}"


def _curves(comparison: "Comparison") -> Section:
    """The metric at each evaluation while training, a curve of means per method and a ring per seed."""
    series, validated = [], False
    for method in comparison.methods:
        found = [_evaluations(o, comparison.metric) for o in _at_best(comparison, method)]
        steps: dict[float, list[float]] = {}
        for run in found:
            for step, value in run:
                steps.setdefault(step, []).append(value)
        if len(steps) > 1:
            means = [statistics.fmean(values) for values in steps.values()]
            rings = [point for run in found for point in run] if len(found) > 1 else []
            series.append(Series(method.label, [*steps], [*means], rings))
        validated = validated or any((o.result or {}).get("validation_rows") for o in _at_best(comparison, method))
    which = "validation" if validated else "test"
    note = f"On the {which} set at each evaluation: the mean over seeds, and a ring for each."
    figure = Lines("step", metric_name(comparison.metric), series) if series else None
    return Section("While training", note, figure)


def _at_best(comparison: "Comparison", method: "MethodResult") -> "list[Outcome]":
    if method.best is None:
        return []
    found = [o for o in comparison.outcomes if o.run.label == method.label and o.result is not None]
    return [outcome for outcome in found if outcome.run.point == method.best.point]


def _evaluations(outcome: "Outcome", metric: str) -> list[tuple[float, float]]:
    try:
        state = json.loads((Path(outcome.run.folder) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    points = ((entry["step"], finite(entry.get(f"eval_{metric}"))) for entry in state["log_history"])
    return [(step, value) for step, value in points if value is not None]


def _rates(methods: "Sequence[MethodResult]", metric: str) -> Section:
    """The metric over the learning rate, where more than one was tried."""
    series = []
    for method in methods:
        tried = sorted(
            (c for c in method.candidates if LEARNING_RATE in c.point), key=lambda c: float(c.point[LEARNING_RATE])
        )
        rates = [float(candidate.point[LEARNING_RATE]) for candidate in tried]
        if len(set(rates)) > 1:
            rings = [
                (rate, value)
                for rate, candidate in zip(rates, tried, strict=True)
                for value in candidate.values.values()
                if len(candidate.values) > 1 and finite(value) is not None
            ]
            series.append(Series(method.label, rates, [finite(candidate.mean) for candidate in tried], rings))
    note = "On the test set: the mean over the seeds that finished, and a ring for each."
    return Section("Learning rates", note, Lines("learning rate", metric, series, log_x=True) if series else None)


def _configs(comparison: "Comparison") -> "dict[str, RunConfig]":
    """The configuration of each method's first run at its best point, or of its first run."""
    first = {}
    for method in comparison.methods:
        runs = _at_best(comparison, method) or [o for o in comparison.outcomes if o.run.label == method.label]
        if runs:
            first[method.label] = runs[0].run.config
    return first
