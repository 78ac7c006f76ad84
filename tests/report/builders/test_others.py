"""Comparisons, intruders, inspection and merges: what their dicts say is on the page, missing values included."""

import json
import math

import pytest

from loraloom.report import Scatter, from_dict, render_terminal, to_dict
from loraloom.report.builders import (
    by_layer,
    comparison_report,
    inspection_report,
    intruder_report,
    merge_report,
)

from ..support import page

RATE = "training.learning_rate"
MODULES = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1, 10) for m in ("q", "v")]


def candidate(rate, mean, spread=0.01):
    return {"point": {RATE: rate}, "values": {"0": mean, "1": mean}, "mean": mean, "spread": spread}


def method(label, mean, **changes):
    candidates = [candidate(1e-4, mean - 0.1), candidate(1e-3, mean)]
    return {
        "label": label,
        "best": candidates[1],
        "candidates": candidates,
        "versus_baseline": None,
        "trainable_parameters": 1000,
        "peak_memory_bytes": 2**30,
        "tokens_per_second": 123.4,
        "wall_time_seconds": 56.7,
        "retention": None,
        "failed": 0,
        **changes,
    }


def comparison(**changes):
    nothing = dict.fromkeys(["best", "trainable_parameters", "peak_memory_bytes", "tokens_per_second"])
    return {
        "task": "text-classification",
        "metric": "macro_f1",
        "lower_is_better": False,
        "baseline": "lora",
        "seeds": [0, 1],
        "methods": [
            method("lora", 0.8),
            method("dora", 0.9, versus_baseline={"difference": 0.1, "p_t": None}),
            method("galore", 0.0, **nothing, wall_time_seconds=None, candidates=[], failed=2),
        ],
        "notes": ["Two seeds prove little."],
        "runs": [{"label": "galore", "point": {RATE: 0.1}, "seed": 0, "error": "diverged", "result": None}],
        "folder": "compare-run",
        **changes,
    }


def sections(report):
    """By title; the report also survives its JSON and both renderers."""
    assert from_dict(json.loads(json.dumps(to_dict(report)))) == report
    assert page(report).count("<section") == len(report.sections)
    assert render_terminal(report)
    return {section.title: section for section in report.sections}


def test_methods_side_by_side():
    report = comparison_report(comparison(), "loraloom compare")
    shown = sections(report)
    assert report.lead == "dora has the best mean macro f1, 0.9, ahead of lora with 0.8."
    bars = shown["Macro f1"].figure
    assert (bars.labels, bars.values, bars.errors) == (["lora", "dora", "galore"], [0.8, 0.9, None], [0.01, 0.01, None])
    table = shown["Macro f1"].table
    assert table.columns[:5] == ["method", "macro f1", "±", "learning rate", "vs lora"]
    assert "retention" not in table.columns
    assert [row[-1] for row in table.rows] == [0, 0, 2]
    assert [series.x for series in shown["Learning rates"].figure.series] == [[1e-4, 1e-3]] * 2
    assert shown["Peak memory"].figure.values == [2**30, 2**30, None]
    assert shown["Runs without a result"].table.rows == [["galore", '{"training.learning_rate": 0.1}', 0, "diverged"]]


def test_the_lowest_is_best_where_it_is():
    report = comparison_report(comparison(lower_is_better=True), "c")
    assert report.lead.startswith("lora has the best mean")


def test_a_comparison_of_which_nothing_finished():
    failed = comparison()["methods"][2]
    report = comparison_report(comparison(methods=[failed], notes=[]), "c")
    assert report.lead == "No run has finished."
    assert "Learning rates" not in sections(report)


def test_points_of_a_search_are_written_out():
    found = method("lora", 0.8)
    found["best"] = {**found["best"], "point": {RATE: 1e-3, "method.r": 8}}
    table = sections(comparison_report(comparison(methods=[found]), "c"))["Macro f1"].table
    assert "learning_rate 0.001, r 8" in table.rows[0]
    assert "best point" in table.columns


def test_layers_are_in_the_order_of_their_numbers():
    heatmap = by_layer({**dict.fromkeys(MODULES, 1.0), "lm_head": 2.0, MODULES[0]: math.nan}, "amount")
    assert heatmap.rows == ["0", "1", "10", "-"]
    assert heatmap.columns == ["q_proj", "v_proj", "lm_head"]
    assert heatmap.values == [[None, 1.0, None], [1.0, 1.0, None], [1.0, 1.0, None], [None, None, 2.0]]


@pytest.mark.parametrize("found", [0, 2])
def test_intruders(found):
    layers = {
        name: {"intruders": [], "cosines": [0.9, 0.8], "relative_norm": 0.02, "effective_rank": 3.5} for name in MODULES
    }
    layers[MODULES[3]] |= {
        "intruders": [0, 1][:found],
        "cosines": [0.2, 0.4] if found else [0.9],
        "relative_norm": None,
    }
    report = intruder_report(layers, "c", title="An adapter", epsilon=0.5, top_k=10)
    shown = sections(report)
    counts = shown["Intruder dimensions"].figure
    assert sum(value for row in counts.values for value in row) == found
    assert counts.values[1][1] == found
    assert len(shown["Intruder dimensions"].table.rows) == len(MODULES)
    assert shown["Size of the update"].figure.values[1][1] is None
    assert "Mitigation trade-off" not in shown
    assert report.lead.startswith("2 intruder dimensions in 1 of 6" if found else "No intruder dimension in 6")


def test_a_sweep_is_one_curve():
    sweep = [{"scale": scale, "task": 0.8 * scale, "retention": 1 - scale} for scale in (1.0, 0.5, 0.0)]
    layers = {MODULES[0]: {"intruders": [0], "cosines": [0.1]}}
    report = intruder_report(layers, "c", title="t", epsilon=0.5, top_k=1, sweep=sweep, task="accuracy")
    figure = sections(report)["Mitigation trade-off"].figure
    assert isinstance(figure, Scatter)
    assert figure.connected
    assert [(point.label, point.x, point.y) for point in figure.points] == [
        ("λ = 1", 0.0, 0.8),
        ("λ = 0.5", 0.5, 0.4),
        ("λ = 0", 1.0, 0.0),
    ]


def test_inspection():
    modules = {name: {"rank": 8, "relative_norm": 0.01 * i, "stable_rank": None} for i, name in enumerate(MODULES)}
    serving = [{"server": "vLLM", "accepted": False, "reason": "use_dora", "run": "loraloom export --to vllm"}]
    inspection = {
        "adapter": "adapters/one",
        "method": "DoRA",
        "parameters": 12345,
        "bytes": 49380,
        "modules": modules,
        "problems": ["B is zero in every module"],
        "serving": serving,
    }
    report = inspection_report(inspection, "loraloom inspect adapters/one")
    shown = sections(report)
    assert report.lead == "1 problem found."
    assert list(shown) == ["Problems", "Size of the update", "Serving"]
    assert shown["Serving"].table.rows == [["vLLM", "no", "use_dora", "loraloom export --to vllm"]]
    modules[MODULES[0]]["rank"] = 16
    report = inspection_report({**inspection, "problems": [], "serving": []}, "c")
    assert list(sections(report)) == ["Size of the update", "Rank"]
    assert report.lead == "No problem found."
    assert [fact.value for fact in report.summary if fact.label == "rank"] == ["8 to 16"]


@pytest.mark.parametrize("verified", [True, False])
def test_merge(verified):
    merge = {
        "out": "merged",
        "base": "base",
        "adapters": ["a", "b"],
        "bytes": 2**31,
        "peak_memory_bytes": 2**28,
        "seconds": 12.34,
        "modules": dict.fromkeys(MODULES, 0.01),
    }
    check = {"prompts": 4, "max_logit_difference": 3e-6, "top1_agreement": 1.0}
    report = merge_report({**merge, "verification": check if verified else None}, "c")
    sections(report)
    facts = {fact.label: fact.value for fact in report.summary}
    assert facts["written"] == "2.00 GiB"
    assert ("same top token" in facts) == verified
    assert ("Not verified" in report.lead) != verified
