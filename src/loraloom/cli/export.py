"""`loraloom export ADAPTER --to TARGET --out DIR`"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from loraloom.cli.options import Saving, parse, progress_on, save_report
from loraloom.errors import InputError
from loraloom.text import printable

if TYPE_CHECKING:
    from loraloom.export.result import ExportReport


@dataclass
class Export(Saving):
    """Write an adapter as a plain LoRA: scales, mixers, gates and compositions folded in. Builds no model.

    What was written is read back and compared, module by module. The folder appears when all of it is right.
    """

    adapter: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of an adapter of PEFT's LoRA or of loraloom."""
    to: Literal["portable", "peft", "vllm", "sglang", "gguf-ready"] = "portable"
    """For whom. portable: vLLM, SGLang and llama.cpp take it. peft: different ranks, DoRA and saved modules stay."""
    out: str | None = None
    """The new folder."""
    base: str | None = None
    """Folder (or hub repository) of the base model; DoRA needs it for a server."""
    rank: int | None = None
    """The rank to write; larger ones are truncated, and the error is reported."""
    allow_lossy: bool = False
    """Write the result though its error is above 1%."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the factors. Servers convert to the model's dtype when they load."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def main(arguments: Sequence[str]) -> None:
    """Export, and show or print the report."""
    command: Export = parse("export", Export, arguments)
    if command.adapter is None or command.out is None:
        raise InputError("export needs the folder of an adapter, and --out with the folder to write", code="usage")
    console = command.console()
    with console.status("Loading PyTorch"):
        from loraloom.export.export import export_adapter

    typed = shlex.join(["loraloom", "export", *arguments])
    with progress_on(console) as progress:
        report = export_adapter(
            command.adapter,
            command.to,
            command.out,
            base=command.base,
            rank=command.rank,
            allow_lossy=command.allow_lossy,
            overwrite=command.overwrite,
            dtype=command.dtype,
            progress=progress,
            command=typed,
        )
    console.print(printable(summary(report)), soft_wrap=True, highlight=False, markup=False)
    if command.report is not None:
        from loraloom.report.builders.adapter import export_report

        save_report(export_report(report, typed), command.report, console)
    command.publish(report.path, console)
    if command.json:
        print(json.dumps(report.to_dict()))


def summary(report: "ExportReport") -> str:
    """What was written and how exact it is, in a few lines."""
    kind = "Approximated" if report.lossy else "Exact up to rounding"
    lines = [
        f"{report.path}: a plain LoRA for {report.target}, {len(report.modules)} modules, rank {report.rank}, "
        f"{report.dtype}",
        f"{kind}: ||dW - dW'||/||dW|| is {report.error:.1e} over all modules, at worst {report.worst.error:.1e} "
        f"({report.worst.module})",
    ]
    if report.dropped:
        lines.append(f"Left out, because their update is zero: {len(report.dropped)} modules")
    if report.completed:
        lines.append(
            f"Factors of zeros for SGLang, which stacks these with adapted ones: {len(report.completed)} modules"
        )
    return "\n".join(lines)
