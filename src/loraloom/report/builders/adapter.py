"""One adapter: what is in it, whether its export is exact, whether the merged model is the right one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.report.builders.modules import by_layer, finite
from loraloom.report.model import Cell, Fact, Report, Section, Table
from loraloom.text import MISSING, number

if TYPE_CHECKING:
    from loraloom.adapter.inspect import Inspection
    from loraloom.export.result import ExportReport
    from loraloom.merge.result import MergeResult

AMOUNTS = (
    ("relative_norm", "Size of the update", "‖ΔW‖ / ‖W‖", "Frobenius norms of the update and of the base weight."),
    ("norm", "Norm of the update", "‖ΔW‖", "Frobenius norm of what the adapter adds to the weight."),
    ("effective_rank", "Effective rank", "effective rank", "Exponential of the entropy of ΔW's singular values."),
    ("stable_rank", "Stable rank", "stable rank", "‖ΔW‖² over the square of its largest singular value."),
    ("gate", "Gates", "gate", "What WeightLoRA multiplies each update by."),
    ("rank", "Rank", "rank", "Columns of A and B that the adapter has."),
)


def inspection_report(inspection: "Inspection", command: str) -> Report:
    """What `loraloom inspect` found: findings, a heatmap of each amount that differs, and the serving table."""
    layers, findings = inspection.layers, inspection.findings
    sections = []
    if findings:
        found: list[list[Cell]] = [[one.level, one.message, _names(one.names)] for one in findings]
        sections.append(Section("Findings", table=Table(["", "what", "where"], found)))
    for key, title, unit, note in AMOUNTS:
        values = {layer.module: finite(getattr(layer, key)) for layer in layers}
        known = {value for value in values.values() if value is not None}
        if not known or (key == "rank" and len(known) == 1):
            continue
        if key == "norm" and any(layer.relative_norm is not None for layer in layers):
            continue
        span: dict[str, Any] = {"signed": True} if min(known) < 0 else {"low": 0.0}
        sections.append(Section(title, note, by_layer(values, unit, **span)))
    if inspection.serving:
        rows: list[list[Cell]] = [
            [one.server, one.effect, "; ".join(one.reasons), one.run] for one in inspection.serving
        ]
        sections.append(Section("Serving", table=Table(["program", "", "why", "what to run"], rows)))
    errors = len(inspection.errors)
    warnings = len(findings) - errors
    found_in_all = f"{errors} error{'s' * (errors != 1)} and {warnings} warning{'s' * (warnings != 1)}."
    return Report(
        title=f"{inspection.method} adapter",
        command=command,
        lead=found_in_all if findings else "Nothing wrong was found.",
        summary=[
            Fact("modules", f"{len(layers):,}"),
            Fact("rank", _span(sorted({layer.rank for layer in layers}))),
            Fact("parameters", f"{inspection.parameters:,}"),
            Fact("size", number(inspection.nbytes, "bytes")),
            Fact("adapter", inspection.path),
            *([Fact("base model", inspection.base)] if inspection.base else []),
        ],
        sections=sections,
    )


def export_report(export: "ExportReport", command: str) -> Report:
    """What `loraloom export` wrote, and how exact it is."""
    exactness = "an approximation" if export.lossy else "exact up to rounding"
    sections = [
        Section(
            "Error",
            "Frobenius norm of what the export changes of each update, over that of the update.",
            by_layer({one.module: finite(one.error) for one in export.modules}, "relative error", low=0.0),
        )
    ]
    if export.dropped:
        rows: list[list[Cell]] = [[name] for name in export.dropped]
        sections.append(Section("Left out", "Their update is zero.", table=Table(["module"], rows)))
    return Report(
        title="Exported adapter",
        command=command,
        lead=f"A plain LoRA for {export.target}: {exactness}, read back and compared.",
        summary=[
            Fact("error", number(export.error, digits=2), "of the update"),
            Fact("modules", f"{len(export.modules):,}"),
            Fact("rank", _span(sorted({one.exported_rank for one in export.modules}))),
            Fact("dtype", export.dtype),
            Fact("folder", export.path),
        ],
        sections=sections,
    )


def merge_report(merge: "MergeResult", command: str) -> Report:
    """What `loraloom merge` wrote, and how far it is from the model with its adapter."""
    check = merge.verification
    facts = []
    if check:
        largest = number(check["max_logit_difference"], digits=2)
        facts += [
            Fact("largest logit difference", largest, f"on {check['prompts']} prompts"),
            Fact("same top token", f"{check['top1_agreement']:.2%}", "of all positions"),
        ]
    facts += [
        Fact("written", number(merge.bytes, "bytes"), f"in {merge.seconds:.1f} s"),
        Fact("peak memory", number(merge.peak_memory_bytes, "bytes")),
        *([Fact("lost by rounding", f"{merge.rounding:.2%}", "of the update")] if merge.rounding else []),
        Fact("base", merge.base),
        *(Fact("adapter", path) for path in merge.adapters),
        Fact("folder", merge.out),
    ]
    lead = (
        f"On {check['prompts']} prompts the merged model's logits differ by at most "
        f"{number(check['max_logit_difference'], digits=2)} from those of the base with its adapter, which itself "
        f"changes them by up to {number(check['adapter_effect'], digits=2)}."
        if check
        else "Not verified: --verify compares the merged model's logits with those of the base with its adapter."
    )
    note = "Frobenius norms of what was added and of the weight before."
    sections = [Section("What was added", note, by_layer(merge.modules, "‖ΔW‖ / ‖W‖", low=0.0))]
    if merge.notes:
        sections.append(Section("Notes", table=Table(["note"], [[note] for note in merge.notes])))
    return Report("Merged model", command, lead, facts, sections)


def _names(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return MISSING
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
