"""The model card of an exported adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.adapter.protocol import Adapter
from loraloom.adapter.serving import serving_data
from loraloom.adapter.stored import StoredAdapter
from loraloom.card import SERVED, Card, adapter_usage, head_outputs
from loraloom.provenance import installed_versions

if TYPE_CHECKING:
    from loraloom.export.result import ExportReport


def export_card(report: "ExportReport", source: Adapter, serving: list[list[str]], command: str) -> Card:
    """Model card for a plain LoRA that `export` made."""
    config = {**source.config, "peft_type": "LORA"}
    served = config.get("task_type") in SERVED
    # The same command anywhere: the folder by its name.
    serving = [[cell.replace(report.path, Path(report.path).name) for cell in row] for row in serving]
    servers = [server for server in serving_data()["servers"].values() if server["target"] != "peft"]
    programs = [server["name"] for server in servers if report.target in (server["target"], "portable")]
    serve = [how for program, effect, how in serving if program in programs and effect == "ok"]
    labels = None
    if report.target == "peft" and isinstance(source, StoredAdapter):  # servers take no head
        labels = head_outputs({key: source.checkpoint.shape(key) for key in source.others})
    exactness = (
        "It is an approximation of the original update"
        if report.lossy
        else "Its update is the original's, rounded once"
    )
    return Card(
        title=f"LoRA for {report.target}",
        summary=f"A plain LoRA of rank {report.rank}, exported from `{Path(source.where).name}` by loraloom: "
        f"{exactness}, read back and compared module by module.",
        base_model=source.config.get("base_model_name_or_path"),
        tags=["lora"],
        usage=adapter_usage(config, labels),
        command=command,
        facts={
            "error over all modules, relative": f"{report.error:.1e}",
            "largest relative error of a module": f"{report.worst.error:.1e}",
            "modules": f"{len(report.modules)}"
            + (f", and {len(report.dropped)} left out because their update is zero" if report.dropped else ""),
            "source, sha256": source.sha256,
        },
        serving=serving if served else (),
        serve=serve if served else (),
        versions=installed_versions(),
    )
