"""The model card of a merged model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraloom.card import Card
from loraloom.provenance import installed_versions


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
