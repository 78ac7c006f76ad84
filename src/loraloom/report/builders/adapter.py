"""One adapter: what is in it, and whether the merged model is the right one."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.report.builders.modules import by_layer, finite
from loraloom.report.model import Cell, Fact, Report, Section, Table
from loraloom.report.scale import MISSING, number

AMOUNTS = (
    ("relative_norm", "Size of the update", "‖ΔW‖ / ‖W‖", "Frobenius norms of the update and of the base weight."),
    ("update_norm", "Norm of the update", "‖ΔW‖", "Frobenius norm of what the adapter adds to the weight."),
    ("effective_rank", "Effective rank", "effective rank", "Exponential of the entropy of ΔW's singular values."),
    ("stable_rank", "Stable rank", "stable rank", "‖ΔW‖² over the square of its largest singular value."),
    ("rank", "Rank", "rank", "Columns of A and B that the adapter has."),
)


def inspection_report(inspection: Mapping[str, Any], command: str) -> Report:
    """What `loraloom inspect` found.

    Args:
        inspection: a dict with `adapter` (its path), `method`, `parameters`, `bytes`, `modules` (by name a dict with
            `rank` and, as far as known, `relative_norm`, `update_norm`, `effective_rank`, `stable_rank`), `problems`
            (sentences; empty if all is well) and `serving` (a dict for each server with `server`, `accepted`,
            `reason` and `run`, what to type to make it fit).
        command: what was typed.
    """
    modules, problems = inspection["modules"], inspection["problems"]
    sections = []
    if problems:
        sections.append(Section("Problems", table=Table(["what is wrong"], [[problem] for problem in problems])))
    for key, title, unit, note in AMOUNTS:
        values = {name: finite(module.get(key)) for name, module in modules.items()}
        known = {value for value in values.values() if value is not None}
        if not known or (key == "rank" and len(known) == 1):
            continue
        if key == "update_norm" and any(module.get("relative_norm") is not None for module in modules.values()):
            continue
        sections.append(Section(title, note, by_layer(values, unit, low=0.0)))
    if inspection.get("serving"):
        rows: list[list[Cell]] = [
            [row["server"], "yes" if row["accepted"] else "no", row["reason"], row["run"]]
            for row in inspection["serving"]
        ]
        sections.append(Section("Serving", table=Table(["server", "loads it", "why", "what to run"], rows)))
    ranks = sorted({module["rank"] for module in modules.values()})
    return Report(
        title=f"{inspection['method']} adapter",
        command=command,
        lead=f"{len(problems)} problem{'s' if len(problems) != 1 else ''} found." if problems else "No problem found.",
        summary=[
            Fact("modules", f"{len(modules):,}"),
            Fact("rank", _span(ranks)),
            Fact("parameters", f"{inspection['parameters']:,}"),
            Fact("size", number(inspection["bytes"], "bytes")),
            Fact("adapter", str(inspection["adapter"])),
        ],
        sections=sections,
    )


def merge_report(merge: Mapping[str, Any], command: str) -> Report:
    """What `loraloom merge` wrote, and how far it is from the model with its adapter.

    Args:
        merge: a dict with `out` (the folder), `base`, `adapters` (paths), `bytes`, `peak_memory_bytes`, `seconds`,
            `modules` (by name ||dW|| / ||W||), and, where it was verified, `verification`: `prompts`,
            `max_logit_difference`, `top1_agreement` (share of positions).
        command: what was typed.
    """
    check = merge.get("verification")
    facts = []
    if check:
        facts += [
            Fact("largest logit difference", number(check["max_logit_difference"]), f"on {check['prompts']} prompts"),
            Fact("same top token", f"{check['top1_agreement']:.2%}", "of all positions"),
        ]
    facts += [
        Fact("written", number(merge["bytes"], "bytes"), f"in {merge['seconds']:.1f} s"),
        Fact("peak memory", number(merge["peak_memory_bytes"], "bytes")),
        Fact("base", str(merge["base"])),
        *(Fact("adapter", str(path)) for path in merge["adapters"]),
        Fact("folder", str(merge["out"])),
    ]
    lead = (
        f"On {check['prompts']} prompts the merged model's logits differ by at most "
        f"{number(check['max_logit_difference'])} from those of the base with its adapter."
        if check
        else "Not verified: --verify compares the merged model's logits with those of the base with its adapter."
    )
    note = "Frobenius norms of what was added and of the weight before."
    sections = [Section("What was added", note, by_layer(merge["modules"], "‖ΔW‖ / ‖W‖", low=0.0))]
    return Report("Merged model", command, lead, facts, sections)


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return MISSING
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
