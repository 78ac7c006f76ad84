"""`loraloom combine ADAPTER ADAPTER ... --out DIR`"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from loraloom.cli.options import Saving, parse, progress_on
from loraloom.errors import InputError


@dataclass
class Combine(Saving):
    """Make one plain LoRA of several adapters, without training and without the base model.

    Works on the updates of the adapters, module by module, so that scales count and no cross terms appear.
    """

    adapters: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders (or hub repositories) of adapters of PEFT's LoRA or of loraloom."""
    out: str | None = None
    """The new folder."""
    method: Literal["linear", "ties", "dare", "core"] = "linear"
    """linear: the weighted sum, exact. ties: trim, elect signs, average. dare: drop entries and rescale. core: task
    singular vectors, orthogonalised."""
    weights: str | None = None
    """One number per adapter, with commas. Default: 1 for each."""
    rank: int | None = None
    """Rank of every module. Default: exact for linear and core, the ranks added up for ties and dare."""
    density: float = 0.5
    """Share of the entries that ties and dare keep."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the factors."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def main(arguments: Sequence[str]) -> None:
    """Combine, and say what came of it."""
    command: Combine = parse("combine", Combine, arguments)
    if not command.adapters or command.out is None:
        raise InputError("combine needs the folders of adapters, and --out with the folder to write", code="usage")
    console = command.console()
    with console.status("Loading PyTorch"):
        from loraloom.combine.combine import combine_adapters, parse_weights
    weights = parse_weights(command.weights, len(command.adapters))
    with progress_on(console) as progress:
        report = combine_adapters(
            command.adapters,
            command.out,
            command.method,
            weights,
            command.rank,
            density=command.density,
            overwrite=command.overwrite,
            dtype=command.dtype,
            command=shlex.join(["loraloom", "combine", *arguments]),
            progress=progress,
        )
    lines = [
        f"{report.path}: {len(report.members)} adapters by {report.method}, {len(report.ranks)} modules, rank up to "
        f"{max(report.ranks.values())}",
        f"Lost by the rank: at worst {report.errors[report.worst]:.1e} of a module's update ({report.worst})",
        *(f"{member} does not adapt {len(modules)} of the modules" for member, modules in report.missing.items()),
    ]
    command.finish(report, lines, console)
