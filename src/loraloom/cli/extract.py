"""`loraloom extract BASE TUNED --rank R --out DIR`"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from loraloom.cli.options import Saving, parse, progress_on
from loraloom.errors import InputError


@dataclass
class Extract(Saving):
    """Write the plain LoRA that is nearest to what separates two checkpoints. Builds no model.

    Reads one weight at a time. What a LoRA of linear layers cannot hold (embeddings, norms, biases) is named.
    """

    base: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of the model before."""
    tuned: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of the model after."""
    out: str | None = None
    """The new folder."""
    rank: int = 16
    """Rank of every module."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the factors."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def main(arguments: Sequence[str]) -> None:
    """Extract, and say what the LoRA holds and what it cannot hold."""
    command: Extract = parse("extract", Extract, arguments)
    if command.base is None or command.tuned is None or command.out is None:
        raise InputError("extract needs the folders of two models, and --out with the folder to write", code="usage")
    console = command.console()
    with console.status("Loading PyTorch"):
        from loraloom.extract.extract import extract_adapter
    with progress_on(console) as progress:
        report = extract_adapter(
            command.base,
            command.tuned,
            command.out,
            command.rank,
            overwrite=command.overwrite,
            dtype=command.dtype,
            command=shlex.join(["loraloom", "extract", *arguments]),
            progress=progress,
        )
    lines = [
        f"{report.path}: {len(report.errors)} modules at rank {report.rank}; {report.unchanged} weights did not change",
        f"Lost of the difference: {report.error:.1%} over all modules, at worst {report.errors[report.worst]:.1%} "
        f"({report.worst})",
    ]
    if report.left_out:
        largest = max(report.left_out, key=lambda key: report.left_out[key])
        lines.append(
            f"Not in the LoRA, though they differ: {len(report.left_out)} tensors, most of all {largest} "
            f"(by {report.left_out[largest]:.1%} of its norm)"
        )
    command.finish(report, lines, console)
