"""A composition, or any adapter in a model without a magnitude, as one ordinary LoRA: :mod:`loraloom.export` of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loraloom.adapter.live import LiveAdapter
from loraloom.adapter.peft_features import changed_base
from loraloom.errors import InputError
from loraloom.export.export import export_adapter
from loraloom.export.plan import ExportPlan
from loraloom.tuner.config import LoomConfig


@dataclass(frozen=True)
class LoraReport:
    """What `to_lora` made of an adapter. Errors are relative and in the Frobenius norm."""

    rank: int
    """Rank of the LoRA, the same in every layer (zero-padded where a layer needs less)."""
    relative_error: float
    """||D - D_k|| / ||D|| over all layers together."""
    layers: dict[str, dict[str, float]]
    """Module -> ``rank`` of the exact update, ``kept`` of it, and its ``relative_error``."""
    folder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries, for JSON."""
        return asdict(self)


@torch.no_grad()
def to_lora(
    model: PeftModel,
    adapter: str = "composition",
    *,
    rank: int | None = None,
    energy: float | None = None,
    save_to: str | Path | None = None,
    new_adapter: str | None = None,
    overwrite: bool = False,
) -> LoraReport:
    """Turns a composition, or any adapter without DoRA, into an ordinary LoRA.

    The LoRA has one rank, lora_alpha = r, and no patterns or rsLoRA, so that every server scales it alike. Without
    ``rank`` and ``energy`` it is exact.

    Args:
        model: the model that has the adapter, which is not changed.
        adapter: its name.
        rank: largest rank to keep.
        energy: share of ||D||^2 to keep in every layer, in (0, 1]; the smallest rank that does so is taken.
        save_to: folder for the LoRA as PEFT saves it, modules_to_save included; loads without loraloom. It appears when
            it has been read back and compared. With members' biases it has PEFT's lora_bias, with which PEFT can run
            layers that have no bias but not merge them.
        new_adapter: name of a new adapter of the model that holds the LoRA.
        overwrite: replace the folder if it has something in it.

    Returns:
        Ranks and errors. Without ``save_to`` and ``new_adapter`` nothing else happens.

    Raises:
        InputError: no such adapter, a DoRA adapter, options out of range, a folder in use, or members with a lora_bias
            where the result cannot have one.
    """
    if new_adapter in getattr(model, "peft_config", {}):
        raise InputError(f"the model has an adapter {new_adapter!r} already: choose another name", code="name-taken")
    source = LiveAdapter(model, adapter)
    if why := changed_base(source.config):
        raise InputError(f"{source.where}: {why}", code="altered-base")
    parts = {name: module.shapes().keys() for name, module in source.modules.items()}
    if dora := [name for name in parts if "magnitude" in parts[name]]:
        raise InputError(
            f"{dora[0]} has a DoRA magnitude, so its update is no product B A: merge the adapter instead", code="dora"
        )
    biased = [name for name in parts if {"bias", "member_bias"} & parts[name]]
    if biased and new_adapter is not None:
        raise InputError(
            f"{biased[0]} has a bias of its members', which an adapter of the model cannot: use save_to", code="bias"
        )
    plan = ExportPlan(source, "peft", rank, energy=energy, one_rank=True)
    plan.fold()
    if save_to is not None:
        export_adapter(
            source, "peft", save_to, rank=rank, energy=energy, one_rank=True, allow_lossy=True, overwrite=overwrite
        )
    if new_adapter is not None:
        _add(model, new_adapter, plan)
    assert plan.rank is not None
    layers: dict[str, dict[str, float]] = {}
    for name, error in plan.errors.items():
        full = plan.ranks[name]
        layers[name] = {"rank": full, "kept": min(full, plan.rank), "relative_error": error}
    return LoraReport(plan.rank, plan.error, layers, None if save_to is None else str(save_to))


def _add(model: PeftModel, name: str, plan: ExportPlan) -> None:
    assert plan.rank is not None
    task = plan.adapter.config.get("task_type")
    model.add_adapter(
        name, LoomConfig(r=plan.rank, lora_alpha=plan.rank, target_modules=[*plan.factors], task_type=task)
    )
    for path, module in LiveAdapter(model, name).modules.items():
        A, B = plan.factors[path]
        parts = module.parts()
        module.store(name, {part: x.to(parts[part]).reshape(parts[part].shape) for part, x in (("A", A), ("B", B))})
