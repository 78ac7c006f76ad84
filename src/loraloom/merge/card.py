"""The model card of a merged model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.card import Card, auto_class, model_usage
from loraloom.provenance import installed_versions

if TYPE_CHECKING:
    from loraloom.merge.result import MergeResult


def merge_card(merge: "MergeResult", config: Mapping[str, Any], command: str) -> Card:
    """Model card for a model that adapters were merged into.

    Args:
        merge: what was merged.
        config: config.json of the merged model.
        command: what was typed.
    """
    names = [Path(adapter).name for adapter in merge.adapters]
    facts = {f"adapter {name}, sha256": digest for name, digest in zip(names, merge.sha256, strict=True)}
    if len(names) > 1:
        facts["weights of the adapters"] = ", ".join(f"{weight:g}" for weight in merge.weights)
    if merge.rounding:
        facts["share of the update lost by rounding"] = f"{merge.rounding:.2%}"
    check = merge.verification
    if check:
        facts[f"largest logit difference to base with adapter, {check['prompts']} prompts"] = (
            f"{check['max_logit_difference']:.2g} (the adapter itself: {check['adapter_effect']:.2g})"
        )
        facts["same top token"] = f"{check['top1_agreement']:.2%} of positions"
    merged = ", ".join(f"`{name}`" for name in names)
    served = auto_class(config) == "AutoModelForCausalLM"
    return Card(
        title=f"{Path(merge.base).name} with {names[0] if len(names) == 1 else f'{len(names)} adapters'} merged",
        summary=" ".join([f"The base model with {merged} merged into its weights by loraloom.", *merge.notes]),
        base_model=merge.base,
        library="transformers",
        tags=["merge"],
        usage=model_usage(config),
        command=command,
        facts=facts,
        serve=[f"vllm serve {Path(merge.out).name}"] if served else (),
        versions=installed_versions(),
    )
