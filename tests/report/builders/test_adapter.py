"""Inspections, exports and merges: what their results say is on the page, missing values included."""

import math

import pytest

from loraloom.adapter.findings import Finding
from loraloom.adapter.inspect import Inspection, LayerReport
from loraloom.adapter.serving import Verdict
from loraloom.export.result import ExportReport, ModuleExport
from loraloom.merge.result import MergeResult
from loraloom.report.builders import by_layer, export_report, inspection_report, merge_report

from .support import sections

MODULES = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1, 10) for m in ("q", "v")]


def test_layers_are_in_the_order_of_their_numbers():
    heatmap = by_layer({**dict.fromkeys(MODULES, 1.0), "lm_head": 2.0, MODULES[0]: math.nan}, "amount")
    assert heatmap.rows == ["0", "1", "10", "-"]
    assert heatmap.columns == ["q_proj", "v_proj", "lm_head"]
    assert heatmap.values == [[None, 1.0, None], [1.0, 1.0, None], [1.0, 1.0, None], [None, None, 2.0]]


def inspection(layers, findings=(), serving=()):
    return Inspection(
        "adapters/one", "LOOM", "DoRA", None, {8: 6}, {"F32": 12}, 12345, 0, 49380, [], layers, [*findings], [*serving]
    )


def layer(module, **changes):
    return LayerReport(module, (8, 8), changes.pop("rank", 8), 2.0, ["A", "B"], 128, **changes)


def test_inspection():
    layers = [layer(m, relative_norm=0.01 * i or math.nan, norm=1.0) for i, m in enumerate(MODULES)]
    findings = [Finding("error", "zero", "B is zero", MODULES), Finding("warning", "zero", "B is zero")]
    serving = [Verdict("vLLM", "rejected", ["a", "b"], "loraloom export")]
    report = inspection_report(inspection(layers, findings, serving), "loraloom inspect adapters/one")
    shown = sections(report)
    assert report.lead == "1 error and 1 warning."
    assert list(shown) == ["Findings", "Size of the update", "Serving"]
    where = f"{', '.join(MODULES[:3])} and 3 more"
    assert shown["Findings"].table.rows == [["error", "B is zero", where], ["warning", "B is zero", ""]]
    assert shown["Serving"].table.rows == [["vLLM", "rejected", "a; b", "loraloom export"]]


def test_inspection_without_a_base():
    layers = [layer(m, norm=1.0, gate=-1.0, rank=16 if i == 0 else 8) for i, m in enumerate(MODULES)]
    report = inspection_report(inspection(layers), "c")
    shown = sections(report)
    assert list(shown) == ["Norm of the update", "Gates", "Rank"]
    assert shown["Gates"].figure.signed
    assert report.lead == "Nothing wrong was found."
    assert [fact.value for fact in report.summary if fact.label == "rank"] == ["8 to 16"]


@pytest.mark.parametrize("lossy", [True, False])
def test_export(lossy):
    modules = [ModuleExport(module, 8, 8, 0.01 if lossy else 1e-8) for module in MODULES]
    report = export_report(ExportReport("out", "vllm", 8, "float32", modules, ["lm_head"], 0.0123, lossy), "c")
    shown = sections(report)
    assert ("an approximation" in report.lead) == lossy
    assert shown["Left out"].table.rows == [["lm_head"]]
    assert report.summary[0].value == "0.012"


@pytest.mark.parametrize("verified", [True, False])
def test_merge(verified):
    check = {"prompts": 4, "max_logit_difference": 3e-6, "adapter_effect": 1.5, "top1_agreement": 1.0}
    merge = MergeResult(
        out="merged",
        base="base",
        base_precision="original",
        adapters=["a", "b"],
        weights=[1.0, 1.0],
        sha256=["0", "1"],
        dtype=None,
        bytes=2**31,
        shards=1,
        modules=dict.fromkeys(MODULES, 0.01),
        added=[],
        rounding=0.0123 if verified else None,
        notes=["One note."] if verified else [],
        seconds=12.34,
        peak_memory_bytes=2**28,
        verification=check if verified else None,
    )
    report = merge_report(merge, "c")
    assert ("Notes" in sections(report)) == verified
    facts = {fact.label: fact.value for fact in report.summary}
    assert facts["written"] == "2.00 GiB"
    assert ("same top token" in facts) == verified
    assert facts.get("lost by rounding") == ("1.23%" if verified else None)
    assert ("Not verified" in report.lead) != verified
