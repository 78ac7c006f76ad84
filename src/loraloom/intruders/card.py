"""The model card of an adapter with reduced intruder dimensions."""

from pathlib import Path

from loraloom.adapter.stored import StoredAdapter
from loraloom.card import SERVED, Card, adapter_usage, head_outputs
from loraloom.intruders.report import IntruderReport
from loraloom.provenance import installed_versions


def intruders_card(
    report: IntruderReport, out: str, source: StoredAdapter, serving: list[list[str]], command: str
) -> Card:
    """Model card for an adapter with reduced intruder dimensions."""
    which = "the first intruder dimension of each module" if report.scope == "top" else "every intruder dimension"
    modules = sum(bool(layer.intruders) for layer in report.layers)
    served = source.config.get("task_type") in SERVED
    serving = [[cell.replace(out, Path(out).name) for cell in row] for row in serving]
    return Card(
        title=f"{source.path.name} with milder intruder dimensions",
        summary=f"The adapter `{source.path.name}`, with {which} (arXiv 2410.21228) scaled by {report.scale:g}.",
        base_model=source.config.get("base_model_name_or_path"),
        tags=["lora"],
        usage=adapter_usage(source.config, head_outputs({key: source.checkpoint.shape(key) for key in source.others})),
        command=command,
        facts={
            "intruder dimensions found": f"{report.count}, in {modules} of {len(report.layers)} modules",
            "looked at": f"the first {report.top_k} singular directions of each module, epsilon {report.epsilon:g}",
            "rank": str(report.rank),
            "largest relative error of a module by its rank": f"{max(report.errors.values()):.1e}",
            "source, sha256": source.sha256,
        },
        serving=serving if served else (),
        versions=installed_versions(),
    )
