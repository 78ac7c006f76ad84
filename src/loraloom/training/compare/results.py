"""From the outcomes of the runs to what a reader wants: for each method its best point, and what it costs there."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.training.compare.config import LEARNING_RATE, Plan
from loraloom.training.compare.execution import Outcome
from loraloom.training.compare.runs import point_key
from loraloom.training.compare.statistics import PairedTest, paired_test, standard_deviation

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """A point that a method was trained at: a learning rate, or a trial of a search."""

    point: Mapping[str, Any]
    values: Mapping[int, float]
    """Seed -> metric on the test set after training, of the finished runs."""
    mean: float
    spread: float | None
    """Standard deviation over the seeds (n - 1); None with a single one."""
    validation_mean: float | None = None
    """Mean of the metric on the validation set, by which points are chosen; None where a run has no such set."""


@dataclass(frozen=True)
class MethodResult:
    """A method at its best point; the costs are of the runs at this point."""

    label: str
    best: Candidate | None
    """None if no run finished."""
    candidates: Sequence[Candidate]
    versus_baseline: PairedTest | None
    """None for the baseline, and without a seed that both finished."""
    trainable_parameters: int | None
    peak_memory_bytes: int | None
    """The largest of the runs; each had a process of its own."""
    tokens_per_second: float | None
    wall_time_seconds: float | None
    retention: float | None
    """Mean metric after training on the set of data.retention, where there is one: accuracy, or loss for causal-lm."""
    retention_before: float | None
    """The same before training."""
    failed: int
    """Runs without a result, or with one that is not finite, over all points."""


@dataclass(frozen=True)
class Comparison:
    """What comparison.json holds, beside a line for each run."""

    task: str
    metric: str
    lower_is_better: bool
    baseline: str
    seeds: Sequence[int]
    methods: Sequence[MethodResult]
    outcomes: Sequence[Outcome]
    notes: Sequence[str]
    """What to know before believing the table."""
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values; `runs` has all of each finished run's metrics.json."""
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("outcomes", "methods")
        }
        return {
            "format_version": FORMAT_VERSION,
            **plain,
            "methods": [dataclasses.asdict(method) for method in self.methods],
            "runs": [
                {
                    "label": outcome.run.label,
                    "point": dict(outcome.run.point),
                    "seed": outcome.run.seed,
                    "folder": str(outcome.run.folder),
                    "error": outcome.error,
                    "result": outcome.result,
                }
                for outcome in self.outcomes
            ],
        }


def summarise(plan: Plan, outcomes: Sequence[Outcome], jobs: int) -> Comparison:
    """The results of a plan's runs.

    The best point of a method has the best mean on the validation set (on the test set, where there is none) among
    those with the most finished seeds: a rate at which some seeds diverge does not win by the others.
    """
    by_label = {e.label: [o for o in outcomes if o.run.label == e.label] for e in plan.entries}
    candidates = {label: _candidates(plan, own) for label, own in by_label.items()}
    best = {label: _best(plan, own) for label, own in candidates.items()}
    methods = [
        _method(label, own, candidates[label], best[label], best[plan.baseline], plan.metric)
        for label, own in by_label.items()
    ]
    return Comparison(
        task=plan.task,
        metric=plan.metric,
        lower_is_better=plan.lower_is_better,
        baseline=plan.baseline,
        seeds=plan.seeds,
        methods=methods,
        outcomes=outcomes,
        notes=_notes(plan, methods, jobs),
        folder=str(plan.folder),
    )


def _method(
    label: str,
    outcomes: Sequence[Outcome],
    candidates: Sequence[Candidate],
    best: Candidate | None,
    baseline: Candidate | None,
    metric: str,
) -> MethodResult:
    point = None if best is None else best.point
    at_best = [o.result for o in outcomes if o.result is not None and o.run.point == point]
    return MethodResult(
        label=label,
        best=best,
        candidates=candidates,
        versus_baseline=None if best is baseline else _test(best, baseline),
        trainable_parameters=max((r["trainable_parameters"] for r in at_best), default=None),
        peak_memory_bytes=max((r["peak_memory_bytes"] or 0 for r in at_best), default=0) or None,
        tokens_per_second=_mean(r["tokens_per_second"] for r in at_best),
        wall_time_seconds=_mean(r["wall_time_seconds"] for r in at_best),
        retention=_retention(at_best, "after"),
        retention_before=_retention(at_best, "before"),
        failed=sum(o.result is None or not math.isfinite(o.result["after"][metric]) for o in outcomes),
    )


def _candidates(plan: Plan, outcomes: Sequence[Outcome]) -> list[Candidate]:
    values: dict[str, dict[int, float]] = {}
    chosen_by: dict[str, list[float | None]] = {}
    points = {point_key(outcome.run.point): outcome.run.point for outcome in outcomes}
    for outcome in outcomes:
        value = None if outcome.result is None else outcome.result["after"][plan.metric]
        if value is not None and math.isfinite(value):  # a run that diverged has no place in a mean
            values.setdefault(point_key(outcome.run.point), {})[outcome.run.seed] = value
            assert outcome.result is not None
            chosen_by.setdefault(point_key(outcome.run.point), []).append(validated(outcome.result, plan.metric))
    return [
        Candidate(
            points[key],
            own,
            statistics.fmean(own.values()),
            standard_deviation([*own.values()]),
            _mean(present) if len(present := [v for v in chosen_by[key] if v is not None]) == len(own) else None,
        )
        for key, own in values.items()
    ]


def validated(result: Mapping[str, Any], metric: str) -> float | None:
    """The metric of a run on its validation set; None without one."""
    return (result.get("validation") or {}).get(metric)


def _best(plan: Plan, candidates: Sequence[Candidate]) -> Candidate | None:
    sign = -1 if plan.lower_is_better else 1
    by_validation = _chosen_by_validation(candidates)

    def goodness(candidate: Candidate) -> tuple[int, float]:
        value = candidate.validation_mean if by_validation else candidate.mean
        assert value is not None
        return len(candidate.values), sign * value

    return max(candidates, key=goodness, default=None)


def _chosen_by_validation(candidates: Sequence[Candidate]) -> bool:
    return all(candidate.validation_mean is not None for candidate in candidates)


def _test(one: Candidate | None, baseline: Candidate | None) -> PairedTest | None:
    if one is None or baseline is None:
        return None
    seeds = [seed for seed in one.values if seed in baseline.values]
    if not seeds:
        return None
    return paired_test([one.values[seed] for seed in seeds], [baseline.values[seed] for seed in seeds])


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return statistics.fmean(collected) if collected else None


def _retention(results: Sequence[Mapping[str, Any]], when: str) -> float | None:
    measured = [r["retention"][when] for r in results if r.get("retention") is not None]
    return _mean(metrics["accuracy" if "accuracy" in metrics else "loss"] for metrics in measured)


def _notes(plan: Plan, methods: Sequence[MethodResult], jobs: int) -> list[str]:
    notes = []
    several = [method for method in methods if len(method.candidates) > 1]
    if several and all(_chosen_by_validation(method.candidates) for method in several):
        notes.append(f"Each method's point was chosen by its mean {plan.metric} on the validation set.")
    elif several:
        notes.append(
            f"Each method's point was chosen by its mean {plan.metric} on the test set that is reported here, as there "
            "is no other: the values are optimistic, more so the more points were tried."
        )
    if plan.search is not None and len(plan.seeds) > 1:
        notes.append(
            f"The search used seed {plan.seeds[0]} alone, which also counts in the means: the best trial was chosen "
            "for doing well with it."
        )
    tests = [method.versus_baseline for method in methods if method.versus_baseline is not None]
    if tests:
        fewest = min(test.n for test in tests)
        smallest = max(test.smallest_p_sign_flip for test in tests)
        if smallest > 0.05:
            notes.append(
                f"With {fewest} paired seeds the exact p cannot be below {smallest:.3g}, whatever the difference is; "
                "the t test assumes normal differences. Six seeds are the fewest for an exact p below 0.05."
            )
        if len(tests) > 1:
            notes.append(
                f"The p values are not corrected for {len(tests)} comparisons; Bonferroni's limit for 0.05 is "
                f"{0.05 / len(tests):.3g}."
            )
    notes += [note for method in methods if (note := _edge(plan, method))]
    if jobs > 1:
        notes.append(
            f"Up to {jobs} runs shared the machine: tokens per second and wall time are not those of one alone."
        )
    return notes


def _edge(plan: Plan, method: MethodResult) -> str | None:
    """A best rate at the end of the grid may not be the best one."""
    entry = next(entry for entry in plan.entries if entry.label == method.label)
    if plan.search is not None or method.best is None or len(entry.learning_rates) < 2:
        return None
    rate = method.best.point[LEARNING_RATE]
    ends = {min(entry.learning_rates): "lowest", max(entry.learning_rates): "highest"}
    if rate not in ends:
        return None
    return f"{method.label}: its best learning rate, {rate:g}, is the {ends[rate]} tried; a better one may lie outside."
