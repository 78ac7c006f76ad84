"""The model card of an exported adapter."""

from typing import TYPE_CHECKING

from loraloom.adapter.stored import StoredAdapter
from loraloom.card import Card
from loraloom.provenance import installed_versions

if TYPE_CHECKING:
    from loraloom.export.export import ExportReport


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
