"""``shrink``: an adapter with smaller ranks, chosen by what each singular value of its updates is worth."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loraloom.adapter.made import MadeAdapter, MadeModule, MadeReport, check_no_magnitude
from loraloom.adapter.open import open_stored
from loraloom.adapter.protocol import AdaptedModule
from loraloom.card import Card
from loraloom.errors import InputError
from loraloom.export.export import ExportReport, export_adapter
from loraloom.io.files import check_apart
from loraloom.progress import Progress, silent, tracked
from loraloom.update.allocate import ranks_for_energy, ranks_for_parameters
from loraloom.update.lowrank import factored_svd, truncate


@dataclass(frozen=True)
class ShrinkReport(MadeReport):
    """The ranks before and after, and what they lose."""

    path: str
    """The new folder."""
    ranks: dict[str, tuple[int, int]]
    """Module -> rank before and after."""
    errors: dict[str, float]
    """Module -> ||D - D'|| / ||D||, Frobenius norms."""
    parameters: tuple[int, int]
    """Of the factors, before and after."""
    error: float
    """||D - D'|| / ||D|| over all modules together."""


@torch.no_grad()
def shrink_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    overwrite: bool = False,
    dtype: str = "float32",
    command: str = "",
    progress: Progress = silent,
) -> ShrinkReport:
    """Writes a plain LoRA with the best approximation of every update at a smaller rank (Eckart and Young, 1936).

    Trained heads, biases and tokens are kept as they are.

    Args:
        adapter: folder or hub repository of an adapter of PEFT's LoRA or of loraloom.
        out: the new folder; it appears when everything is written, read back and compared.
        rank: the largest rank of any module.
        energy: in place of it, the share of ||D||^2 that every module keeps, in (0, 1].
        parameters: in place of both, how many parameters the factors may have altogether; ranks go to the modules where
            they lose least.
        overwrite: replace `out`.
        dtype: of the factors: float32, bfloat16 or float16.
        command: what was typed, for the model card.
        progress: is told of the modules decomposed, written and compared.

    Raises:
        InputError: not exactly one of rank, energy and parameters, or out of range; the adapter is broken or has DoRA
            magnitudes or biases of its own.
    """
    given = {"rank": rank, "energy": energy, "parameters": parameters}
    if sum(value is not None for value in given.values()) != 1:
        raise InputError(
            f"{', '.join(f'{k}={v}' for k, v in given.items())}: give exactly one of them", code="shrink-target"
        )
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank} must be a positive integer", code="rank")
    source = open_stored(adapter)
    check_no_magnitude(source.modules, str(source.path), "shrink")
    check_apart(Path(out), [source.path])
    factors, spectra = {}, {}
    for name, module in tracked(source.modules.items(), "Decomposing", progress):
        factors[name] = module.factors()
        spectra[name] = factored_svd(*(factor.double() for factor in factors[name]))[1]
    costs = {name: sum(module.shape) for name, module in source.modules.items()}
    try:
        if parameters is not None:
            ranks = ranks_for_parameters(spectra, costs, parameters)
        elif energy is not None:
            ranks = ranks_for_energy(spectra, energy)
        else:
            ranks = {name: min(int(rank or 0), len(S)) for name, S in spectra.items()}
    except ValueError as error:
        raise InputError(f"{source.path}: {error}", code="shrink-target") from None
    errors: dict[str, float] = {}
    squares = [0.0, 0.0]

    def make(name: str, module: AdaptedModule) -> MadeModule:
        def shrunk() -> tuple[torch.Tensor, torch.Tensor]:
            A, B = factors[name]
            errors[name] = 0.0
            if ranks[name] < A.shape[0]:
                smaller = truncate(A.double(), B.double(), ranks[name])
                A, B, errors[name] = smaller[0].to(A.dtype), smaller[1].to(B.dtype), smaller[2]
            norm = float(spectra[name].square().sum())
            squares[0] += errors[name] ** 2 * norm
            squares[1] += norm
            return A, B

        return MadeModule(name, shrunk, module.shapes()["A"][1:] if module.kernel else (), module.embedding)

    modules = {name: make(name, module) for name, module in source.modules.items()}
    made = MadeAdapter(source.path.name, modules, source.config, source.sha256, beside=source)

    def card(original: Card, report: ExportReport) -> Card:
        return replace(
            original,
            title=f"{source.path.name}, with smaller ranks",
            summary=f"The adapter `{source.path.name}` as a plain LoRA with the best approximation of every update.",
            facts={
                "error over all modules, relative": f"{_relative(squares):.1e}",
                "largest relative error of a module": f"{max(errors.values()):.1e}",
                "source, sha256": source.sha256,
            },
        )

    export_adapter(made, "peft", out, overwrite=overwrite, dtype=dtype, command=command, card=card, progress=progress)
    before = {name: module.rank for name, module in source.modules.items()}
    after = {name: module.rank for name, module in modules.items()}
    return ShrinkReport(
        path=str(out),
        ranks={name: (before[name], after[name]) for name in modules},
        errors={name: errors[name] for name in modules},
        parameters=(sum(before[n] * costs[n] for n in costs), sum(after[n] * costs[n] for n in costs)),
        error=_relative(squares),
    )


def _relative(squares: list[float]) -> float:
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
