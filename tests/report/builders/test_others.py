"""Comparisons, intruders, inspection and merges: what their dicts say is on the page, missing values included."""

import dataclasses
import json
import math

import pytest

from loraloom.report import Scatter
from loraloom.report.builders import (
    by_layer,
    comparison_report,
    inspection_report,
    intruder_report,
    merge_report,
    trade_off_section,
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
    """By title; the report is also JSON, and a page with all of them."""
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    assert page(report).count("<section") == len(report.sections)
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


def layer(name, **changes):
    known = {"intruders": [], "cosines": [0.9, 0.8], "exact": True, "relative_norm": 0.02, "effective_rank": 3.5}
    return {"name": name, **known, **changes}


def found_in(layers, **changes):
    return {"adapter": "runs/an-adapter", "top_k": 10, "epsilon": 0.5, "layers": layers, **changes}


@pytest.mark.parametrize("found", [0, 2])
def test_intruders(found):
    layers = [layer(name) for name in MODULES]
    layers[3] |= {"intruders": [0, 1][:found], "cosines": [0.2, 0.4] if found else [0.9], "relative_norm": None}
    report = intruder_report(found_in(layers), "c")
    shown = sections(report)
    assert report.title == "Intruder dimensions of an-adapter"
    counts = shown["Intruder dimensions"].figure
    assert sum(value for row in counts.values for value in row) == found
    assert counts.values[1][1] == found
    assert len(shown["Intruder dimensions"].table.rows) == len(MODULES)
    assert shown["Size of the update"].figure.values[1][1] is None
    assert not {"Mitigation trade-off", "Lost to the rank"} & shown.keys()
    assert "bound" not in shown["Lowest cosine"].note
    assert report.lead.startswith("2 intruder dimensions in 1 of 6" if found else "No intruder dimension in 6")


def test_bounds_are_called_bounds_and_errors_are_shown():
    layers = [layer(MODULES[0], exact=False, error=0.1), layer(MODULES[1], error=0.2)]
    shown = sections(intruder_report(found_in(layers), "c"))
    assert "an upper bound" in shown["Lowest cosine"].note
    assert shown["Lost to the rank"].figure.values == [[0.1, 0.2]]


def test_a_sweep_is_one_curve():
    sweep = [{"scale": s, "metrics": {"accuracy": 0.8 * s, "kept": 1 - s}, "error": 0.0} for s in (1.0, 0.5, 0.0)]
    section = sections(intruder_report(found_in([layer(MODULES[0])]), "c", sweep=sweep))["Mitigation trade-off"]
    assert isinstance(section.figure, Scatter)
    assert section.figure.connected
    assert (section.figure.x_label, section.figure.y_label) == ("kept", "accuracy")
    drawn = [(point.label, point.x, point.y) for point in section.figure.points]
    assert drawn == [("λ = 1", 0.0, 0.8), ("λ = 0.5", 0.5, 0.4), ("λ = 0", 1.0, 0.0)]
    assert section.table.rows[1] == [0.5, 0.4, 0.5, 0.0]


@pytest.mark.parametrize("metrics", [{}, {"accuracy": 0.5}])
def test_a_sweep_with_fewer_metrics_is_drawn_over_the_scale(metrics):
    sweep = [{"scale": scale, "metrics": metrics, "error": 0.25} for scale in (1.0, 0.5)]
    section = trade_off_section(sweep)
    (curve,) = section.figure.series
    assert (curve.name, curve.y) == (("accuracy", [0.5, 0.5]) if metrics else ("lost to the rank", [0.25, 0.25]))


def test_inspection():
    nothing = dict.fromkeys(["norm", "relative_norm", "effective_rank", "stable_rank", "gate"])
    layers = [
        {**nothing, "module": m, "rank": 8, "relative_norm": 0.01 * i, "norm": 1.0} for i, m in enumerate(MODULES)
    ]
    layers[0]["relative_norm"] = math.nan
    finding = {"level": "error", "code": "zero", "message": "B is zero", "names": MODULES}
    inspection = {
        "path": "adapters/one",
        "method": "DoRA",
        "base": None,
        "parameters": 12345,
        "nbytes": 49380,
        "layers": layers,
        "findings": [finding, {**finding, "level": "warning", "names": []}],
        "serving": [{"server": "vLLM", "effect": "rejected", "reasons": ["a", "b"], "run": "loraloom export"}],
    }
    report = inspection_report(inspection, "loraloom inspect adapters/one")
    shown = sections(report)
    assert report.lead == "1 error and 1 warning."
    assert list(shown) == ["Findings", "Size of the update", "Serving"]
    where = f"{', '.join(MODULES[:3])} and 3 more"
    assert shown["Findings"].table.rows == [["error", "B is zero", where], ["warning", "B is zero", ""]]
    assert shown["Serving"].table.rows == [["vLLM", "rejected", "a; b", "loraloom export"]]
    for layer in layers:
        layer |= {"relative_norm": None, "gate": -1.0}
    layers[0]["rank"] = 16
    report = inspection_report({**inspection, "findings": [], "serving": []}, "c")
    shown = sections(report)
    assert list(shown) == ["Norm of the update", "Gates", "Rank"]
    assert shown["Gates"].figure.signed
    assert report.lead == "Nothing wrong was found."
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
        "rounding": 0.0123 if verified else None,
        "notes": ["One note."] if verified else [],
    }
    check = {"prompts": 4, "max_logit_difference": 3e-6, "adapter_effect": 1.5, "top1_agreement": 1.0}
    report = merge_report({**merge, "verification": check if verified else None}, "c")
    assert ("Notes" in sections(report)) == verified
    facts = {fact.label: fact.value for fact in report.summary}
    assert facts["written"] == "2.00 GiB"
    assert ("same top token" in facts) == verified
    assert facts.get("lost by rounding") == ("1.23%" if verified else None)
    assert ("Not verified" in report.lead) != verified
