"""``combine``: adapters on disk as one plain LoRA, module by module, without training and without the base model."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraloom.adapter.made import MadeAdapter, MadeModule, MadeReport, check_no_magnitude
from loraloom.adapter.open import open_stored
from loraloom.adapter.stored import PREFIX, StoredAdapter
from loraloom.card import Card
from loraloom.errors import InputError
from loraloom.export.export import ExportReport, export_adapter
from loraloom.io.files import check_apart
from loraloom.progress import Progress, silent
from loraloom.update.combine import Method, combine


@dataclass(frozen=True)
class CombineReport(MadeReport):
    """What was combined, and what the rank cost."""

    path: str
    """The new folder."""
    method: str
    members: dict[str, float]
    """Folder of each member -> its weight."""
    ranks: dict[str, int]
    """Module -> rank of the result there."""
    errors: dict[str, float]
    """Module -> ||D - D'|| / ||D||, where D is what the method asks for; 0 where it is exact."""
    missing: dict[str, list[str]]
    """Member -> modules that only other members adapt; its update there is 0."""


@torch.no_grad()
def combine_adapters(
    members: Sequence[str | Path],
    out: str | Path,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    density: float = 0.5,
    overwrite: bool = False,
    dtype: str = "float32",
    command: str = "",
    progress: Progress = silent,
) -> CombineReport:
    """Combines adapters of PEFT's LoRA or of loraloom into one plain LoRA, in a new folder.

    Unlike PEFT's ``add_weighted_adapter`` it works on the updates s B M A and not on A and B apart: scales, patterns,
    mixers and gates count, no cross terms appear, and one member with weight 1 is itself. See
    :func:`loraloom.update.combine.combine` for the methods.

    Args:
        members: folders, or repositories of the hub.
        out: the new folder; it appears when everything is written, read back and compared.
        method: "linear", "ties", "dare" or "core".
        weights: one per member; None: 1 for each.
        rank: of every module; None: the smallest at which "linear" and "core" are exact, and the members' ranks added
            up for "ties" and "dare".
        density: share of the entries that "ties" and "dare" keep.
        overwrite: replace `out`.
        dtype: of the factors: float32, bfloat16 or float16.
        command: what was typed, for the model card.
        progress: is told of the modules combined, then of those compared.

    Raises:
        InputError: a member is broken, or holds more than low-rank updates (DoRA, biases, trained heads or tokens);
            members that do not fit together; weights that do not fit the members.
    """
    if not members:
        raise InputError("combine needs at least one adapter", code="members")
    weights = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(members) or not all(map(math.isfinite, weights)):
        raise InputError(
            f"weights={weights} for {len(members)} adapters: expected a finite number for each", code="weights"
        )
    adapters = [open_stored(member) for member in members]
    for adapter in adapters:
        check_no_magnitude(adapter.modules, str(adapter.path), "combine")
        if adapter.others:
            raise InputError(
                f"{adapter.path} holds {adapter.others[0].removeprefix(PREFIX)} and {len(adapter.others) - 1} more "
                "trained tensors, which are no low-rank update and would be lost: loraloom merge takes all",
                code="other-tensors",
            )
    check_apart(Path(out), [adapter.path for adapter in adapters])
    errors: dict[str, float] = {}
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))

    def make(name: str) -> MadeModule:
        own = [(i, adapter.modules[name]) for i, adapter in enumerate(adapters) if name in adapter.modules]
        first = own[0][1]
        for i, module in own:
            if (module.shape, module.kernel, module.embedding) != (first.shape, first.kernel, first.embedding):
                raise InputError(
                    f"{name} is {first.shape[0]} x {first.shape[1]} in {adapters[own[0][0]].path} and "
                    f"{module.shape[0]} x {module.shape[1]} in {adapters[i].path}: they are of different base models",
                    code="shape",
                )

        def factors() -> tuple[torch.Tensor, torch.Tensor]:
            A, B, errors[name] = combine(
                [module.factors() for _, module in own],
                [weights[i] for i, _ in own],
                method,
                rank=rank,
                density=density,
                names=[f"{adapters[i].sha256} {name}" for i, _ in own],
            )
            return A, B

        channels = first.shapes()["A"][1:] if first.kernel else ()
        return MadeModule(name, factors, channels, first.embedding)

    digest = hashlib.sha256("".join(adapter.sha256 for adapter in adapters).encode()).hexdigest()
    modules = {name: make(name) for name in names}
    made = MadeAdapter(" + ".join(adapter.path.name for adapter in adapters), modules, common(adapters), digest)

    def card(original: Card, report: ExportReport) -> Card:
        worst = max(errors.values())
        facts = {
            f"weight of {a.path.name}": f"{w:g} (sha256 {a.sha256})" for a, w in zip(adapters, weights, strict=True)
        }
        facts["largest relative error of a module by its rank"] = f"{worst:.1e}"
        return replace(
            original,
            title=f"{made.where}, combined",
            summary=f"{len(adapters)} adapters combined by loraloom with `{method}` into one plain LoRA.",
            facts=facts,
        )

    export_adapter(made, "peft", out, overwrite=overwrite, dtype=dtype, command=command, card=card, progress=progress)
    return CombineReport(
        path=str(out),
        method=method,
        members={str(adapter.path): weight for adapter, weight in zip(adapters, weights, strict=True)},
        ranks={name: module.rank for name, module in modules.items()},
        errors={name: errors[name] for name in names},
        missing={
            str(adapter.path): gone for adapter in adapters if (gone := [n for n in names if n not in adapter.modules])
        },
    )


def common(adapters: Sequence[StoredAdapter]) -> dict[str, Any]:
    """What all configurations agree in."""
    first, *others = (adapter.config for adapter in adapters)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def parse_weights(text: str | None, count: int) -> list[float] | None:
    """``"0.7,0.3"`` as numbers.

    Raises:
        InputError: not numbers, or not as many as there are adapters.
    """
    if text is None:
        return None
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text!r}: expected numbers with commas, 0.7,0.3", code="weights") from None
    if len(weights) != count:
        raise InputError(f"--weights {text!r} has {len(weights)} numbers for {count} adapters", code="weights")
    return weights
