"""A comparison: the sentence says what the numbers allow, and every seed is a point."""

import dataclasses
import json

import pytest

from loraloom.report.builders import comparison_report
from loraloom.training.compare.config import LEARNING_RATE
from loraloom.training.compare.execution import Outcome
from loraloom.training.compare.results import Candidate, Comparison, MethodResult
from loraloom.training.compare.runs import Run
from loraloom.training.compare.statistics import paired_test, standard_deviation
from loraloom.training.compare.verdict import verdict
from loraloom.training.config import MethodSection, RunConfig

from .support import sections

NOTHING = dict.fromkeys(f.name for f in dataclasses.fields(MethodResult))


def candidate(rate, values):
    return Candidate(
        {LEARNING_RATE: rate}, dict(enumerate(values)), sum(values) / len(values), standard_deviation(values)
    )


def method(label, values, baseline=None, **changes):
    best = candidate(1e-3, values)
    fields = {
        "label": label,
        "best": best,
        "candidates": [candidate(1e-4, [v - 0.1 for v in values]), best],
        "versus_baseline": None if baseline is None else paired_test(values, baseline),
        "trainable_parameters": 1000,
        "peak_memory_bytes": 2**30,
        "tokens_per_second": 123.4,
        "wall_time_seconds": 56.7,
        "retention": None,
        "retention_before": None,
        "failed": 0,
    }
    return MethodResult(**{**fields, **changes})


LORA, DORA = [0.79, 0.8, 0.81], [0.89, 0.9, 0.94]
FAILED = MethodResult(**{**NOTHING, "label": "galore", "candidates": [], "failed": 3})


def comparison(*methods, tmp_path=None, **changes):
    """With `tmp_path`: and the folders of the runs, with two evaluations each."""
    outcomes = []
    for one in methods:
        for seed in range(3):
            config = RunConfig(method=MethodSection(name="lora", r=8 if one.label == "dora" else 16))
            config = dataclasses.replace(
                config, output=dataclasses.replace(config.output, dir=f"{tmp_path}/{one.label}{seed}")
            )
            run = Run(one.label, {LEARNING_RATE: 1e-3}, seed, config)
            if one.best is None:
                outcomes.append(Outcome(run, None, "diverged"))
                continue
            outcomes.append(Outcome(run, {"after": {"accuracy": one.best.values[seed]}}))
            if tmp_path:
                run.folder.mkdir()
                history = [{"step": s, "eval_accuracy": s / 100 + seed / 10} for s in (10, 20)] + [
                    {"step": 20, "loss": 1}
                ]
                (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    fields = {
        "task": "text-classification",
        "metric": "accuracy",
        "lower_is_better": False,
        "baseline": "lora",
        "seeds": [0, 1, 2],
        "methods": methods,
        "outcomes": outcomes,
        "notes": ["Three seeds prove little."],
        "folder": "compare-run",
    }
    return Comparison(**{**fields, **changes})


def test_every_seed_is_a_point_and_no_number_stands_twice(tmp_path):
    lora, dora = method("lora", LORA), method("dora", DORA, LORA)
    report = comparison_report(comparison(lora, dora, FAILED, tmp_path=tmp_path), "loraloom compare")
    shown = sections(report)
    assert list(shown) == [
        *(
            "Results",
            "Before you believe it",
            "While training",
            "Learning rates",
            "Runs without a result",
            "Configuration",
        ),
    ]
    bars = shown["Results"].figure
    assert (bars.labels, bars.samples) == (["lora", "dora", "galore"], [LORA, DORA, []])
    assert bars.values[2] is None
    table = shown["Results"].table
    assert table.columns[:5] == ["method", "best point", "minus lora", "p, exact", "p, t test"]
    assert not any("retention" in name for name in table.columns)
    assert bars.values[0] not in table.rows[0]
    curves = shown["While training"].figure.series
    assert [(one.name, one.x) for one in curves] == [("lora", [10, 20]), ("dora", [10, 20])]
    assert curves[0].y == pytest.approx([0.2, 0.3])
    assert len(curves[0].points) == 6
    rates = shown["Learning rates"].figure.series
    assert [one.x for one in rates] == [[1e-4, 1e-3]] * 2
    assert sum(x == 1e-3 for x, _ in rates[0].points) == 3
    assert shown["Runs without a result"].table.rows[0] == ["galore", "learning rate 0.001", 0, "diverged"]
    configuration = shown["Configuration"].table
    assert configuration.rows == [["method.r", "16", "8", "16"]]


def test_the_verdict_names_the_spread_and_the_exact_p():
    text = verdict(comparison(method("lora", LORA), method("dora", DORA, LORA)))
    assert text == (
        "lora has accuracy 0.8 ± 0.01. dora is better by 0.11, more than the spread over seeds (0.026); exact p 0.25, "
        "the smallest that 3 seeds can give."
    )
    near = verdict(comparison(method("lora", LORA), method("dora", [0.8, 0.79, 0.815], LORA)))
    assert "better by 0.0017, less than the spread over seeds (0.013); exact p 1 with 3 seeds" in near
    assert "worse by 0.11" in verdict(
        comparison(method("lora", LORA), method("dora", DORA, LORA), lower_is_better=True)
    )


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([FAILED], "No run has finished."),
        ([dataclasses.replace(FAILED, label="lora"), method("dora", DORA)], "lora, the baseline, has no finished run"),
        ([method("lora", LORA), FAILED], "galore has no finished run."),
        ([method("lora", [0.5]), method("dora", [0.6], [0.5])], "better by 0.1 with one seed"),
        ([method("lora", LORA), method("dora", LORA, LORA)], "dora has the same mean."),
    ],
    ids=["nothing", "no baseline", "no method", "one seed", "equal"],
)
def test_a_verdict_says_no_more_than_there_is(methods, expected):
    baseline = "galore" if methods == [FAILED] else "lora"
    seeds = [one for one in methods if (one.best is not None and len(one.best.values) == 3) or one.best is None]
    found = comparison(*seeds, baseline=baseline)
    assert expected in verdict(dataclasses.replace(found, methods=methods))


def test_without_folders_there_are_no_curves():
    shown = sections(comparison_report(comparison(method("lora", LORA), method("dora", DORA, LORA)), "c"))
    assert "While training" not in shown
