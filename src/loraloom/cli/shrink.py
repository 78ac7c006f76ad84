"""`loraloom shrink ADAPTER --rank R | --energy E | --parameters N --out DIR`"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from loraloom.cli.options import Saving, parse, progress_on
from loraloom.errors import InputError


@dataclass
class Shrink(Saving):
    """Write an adapter with smaller ranks: the best approximation of every update. Builds no model."""

    adapter: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of an adapter of PEFT's LoRA or of loraloom."""
    out: str | None = None
    """The new folder."""
    rank: int | None = None
    """The largest rank of any module."""
    energy: float | None = None
    """In its place: the share of its squared norm that every module keeps, such as 0.99."""
    parameters: int | None = None
    """In place of both: parameters of all factors together; ranks go where they lose least."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the factors."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def main(arguments: Sequence[str]) -> None:
    """Shrink, and say what it lost."""
    command: Shrink = parse("shrink", Shrink, arguments)
    if command.adapter is None or command.out is None:
        raise InputError("shrink needs the folder of an adapter, and --out with the folder to write", code="usage")
    console = command.console()
    with console.status("Loading PyTorch"):
        from loraloom.shrink.shrink import shrink_adapter
    with progress_on(console) as progress:
        report = shrink_adapter(
            command.adapter,
            command.out,
            rank=command.rank,
            energy=command.energy,
            parameters=command.parameters,
            overwrite=command.overwrite,
            dtype=command.dtype,
            command=shlex.join(["loraloom", "shrink", *arguments]),
            progress=progress,
        )
    before, after = report.parameters
    ranks = [rank for _, rank in report.ranks.values()]
    lines = [
        f"{report.path}: ranks {min(ranks)} to {max(ranks)}, {after:,} parameters in place of {before:,}",
        f"||dW - dW'||/||dW|| is {report.error:.1e} over all modules, at worst {report.errors[report.worst]:.1e} "
        f"({report.worst})",
    ]
    command.finish(report, lines, console)
