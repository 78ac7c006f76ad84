"""What the model cards of exported, merged and mitigated weights say."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.checkpoint.adapter import StoredAdapter, open_adapter
from loraloom.checkpoint.card import Card
from loraloom.checkpoint.serving import serving_table
from loraloom.versions import installed_versions

if TYPE_CHECKING:
    from loraloom.checkpoint.export import ExportReport
    from loraloom.spectral.report import IntruderReport


def serving_rows(folder: Path, name: str | Path | None = None) -> list[list[str]]:
    """The serving table of a saved adapter, as rows with headings.

    Args:
        folder: where it is now.
        name: where it will be, for the commands; None: there.
    """
    rows = [["program", "", "why, or how"]]
    for verdict in serving_table(open_adapter(folder)):
        how = "; ".join(verdict.reasons) or verdict.run.replace(str(folder), str(name or folder))
        rows.append([verdict.server, verdict.effect, how])
    return rows


def export_card(report: "ExportReport", source: StoredAdapter, serving: list[list[str]], command: str) -> Card:
    """Of a plain LoRA that `export` made."""
    exactness = (
        "It is an approximation of the original update"
        if report.lossy
        else "Its update is the original's, rounded once"
    )
    return Card(
        title=f"LoRA for {report.target}",
        summary=f"A plain LoRA of rank {report.rank}, exported from `{source.path.name}` by loraloom: {exactness}, "
        "read back and compared module by module.",
        base_model=source.config.get("base_model_name_or_path"),
        tags=["lora"],
        usage=f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "{report.path}")',
        command=command,
        facts={
            "error over all modules, relative": f"{report.error:.1e}",
            "largest relative error of a module": f"{report.worst.error:.1e}",
            "modules": f"{len(report.modules)}"
            + (f", and {len(report.dropped)} left out because their update is zero" if report.dropped else ""),
            "source, sha256": source.sha256,
        },
        serving=serving,
        versions=installed_versions(),
    )


def intruders_card(
    report: "IntruderReport", out: str, source: StoredAdapter, serving: list[list[str]], command: str
) -> Card:
    """Of an adapter in which `intruders` scaled intruder dimensions down."""
    which = "the first intruder dimension of each module" if report.scope == "top" else "every intruder dimension"
    modules = sum(bool(layer.intruders) for layer in report.layers)
    needs = "" if source.kind == "LORA" else "import loraloom  # registers the type\n"
    return Card(
        title=f"{source.path.name} with milder intruder dimensions",
        summary=f"The adapter `{source.path.name}`, with {which} (arXiv 2410.21228) scaled by {report.scale:g}.",
        base_model=source.config.get("base_model_name_or_path"),
        tags=["lora"],
        usage=f'{needs}from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "{out}")',
        command=command,
        facts={
            "intruder dimensions found": f"{report.count}, in {modules} of {len(report.layers)} modules",
            "looked at": f"the first {report.top_k} singular directions of each module, epsilon {report.epsilon:g}",
            "rank": str(report.rank),
            "largest relative error of a module by its rank": f"{max(report.errors.values()):.1e}",
            "source, sha256": source.sha256,
        },
        serving=serving,
        versions=installed_versions(),
    )


def merge_card(merge: Mapping[str, Any], command: str) -> Card:
    """Of a model that adapters were merged into; `merge` is merge.json as a dict."""
    adapters = ", ".join(f"`{Path(name).name}`" for name in merge["adapters"])
    facts = {f"adapter {Path(n).name}, sha256": s for n, s in zip(merge["adapters"], merge["sha256"], strict=True)}
    if len(merge["adapters"]) > 1:
        facts["weights of the adapters"] = ", ".join(f"{weight:g}" for weight in merge["weights"])
    if merge["rounding"]:
        facts["share of the update lost by rounding"] = f"{merge['rounding']:.2%}"
    check = merge["verification"]
    if check:
        facts[f"largest logit difference to base with adapter, {check['prompts']} prompts"] = (
            f"{check['max_logit_difference']:.2g} (the adapter itself: {check['adapter_effect']:.2g})"
        )
        facts["same top token"] = f"{check['top1_agreement']:.2%} of positions"
    return Card(
        title=f"{Path(str(merge['base'])).name} with {len(merge['adapters'])} adapter(s) merged",
        summary=" ".join([f"The base model with {adapters} merged into its weights by loraloom.", *merge["notes"]]),
        base_model=str(merge["base"]),
        library="transformers",
        tags=["merge"],
        usage=f'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{merge["out"]}")',
        command=command,
        facts=facts,
        versions=installed_versions(),
    )
