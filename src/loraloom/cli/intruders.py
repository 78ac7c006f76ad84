"""`loraloom intruders ADAPTER --base MODEL [--out DIR | --sweep SCALES]`"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from loraloom.cli.options import Saving, parse, progress_on, quiet_libraries, save_report
from loraloom.errors import InputError

if TYPE_CHECKING:
    from loraloom.intruders.report import IntruderReport, SweepReport


@dataclass
class Intruders(Saving):
    """Find an adapter's intruder dimensions, the directions that its base does not have, and scale them down.

    Reads the files module by module and builds no model. The adapter is never changed: --out writes another one.
    """

    adapter: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of an adapter of PEFT's LoRA or of loraloom, or of a run of loraloom train."""
    base: str | None = None
    """Folder (or hub repository) of the base model. Default: the one that the adapter's configuration names."""
    top_k: int = 10
    """How many singular directions of each adapted weight to look at."""
    epsilon: float = 0.5
    """A direction with no cosine as large as this to one of the base's is an intruder."""
    out: str | None = None
    """Write an adapter in which intruders are scaled down into this new folder."""
    scale: float = 0.75
    """--out: what is left of an intruder. 1 changes nothing, 0 removes it; the paper finds 0.7 to 0.9 safe."""
    scope: Literal["top", "all"] = "top"
    """Scale the first intruder of each module, as in the paper, or all of them."""
    rank: Literal["exact", "keep"] | int = "exact"
    """exact: the ranks grow by what was scaled. keep: they stay, and the error is reported. A number: that rank."""
    sweep: str | None = None
    """Scales to compare, such as 0.5,0.7,0.9. Of a run of loraloom train also the task and data.retention are measured
    at each, with the model."""
    rewind: bool = False
    """--sweep: also W + t dW at the same numbers, the control: does scaling intruders keep more for the same task?"""
    overwrite: bool = False
    """--out: replace the folder if it is there."""


def main(arguments: Sequence[str]) -> None:
    """Find, write or compare, and show or print the result."""
    command: Intruders = parse("intruders", Intruders, arguments)
    if command.adapter is None:
        raise InputError("intruders needs the folder of an adapter", code="usage")
    if command.out is not None and command.sweep is not None:
        raise InputError("--out writes one scale, --sweep compares several: choose one of them", code="exclusive")
    if command.rewind and command.sweep is None:
        raise InputError("--rewind goes with --sweep: give the scales", code="rewind")
    if command.push is not None and command.out is None:
        raise InputError("--push uploads what --out writes: give both", code="usage")
    typed = shlex.join(["loraloom", "intruders", *arguments])
    scales = None if command.sweep is None else _scales(command.sweep)
    console = command.console()
    try:
        if scales is not None:
            swept = _sweep(command, scales, console)
            found, result = swept.intruders, swept.to_dict()
        else:
            found = _find(command, typed, console)
            result = found.to_dict()
    except ValueError as error:  # of an option, from the library
        raise InputError(str(error), code="intruders") from error
    console.print(found.table())
    console.print(_summary(found), highlight=False, soft_wrap=True)
    if scales is not None:
        console.print(swept.table())
    if command.sweep is not None and not _is_run(command.adapter):
        console.print(
            "What a scale does to the task and to what the base knew takes the model and its data: give the folder of "
            "a run of loraloom train, with data.retention for the second.",
            highlight=False,
            soft_wrap=True,
        )
    if command.out is not None:
        console.print(
            f"Written to {command.out}, with scale {command.scale:g}", highlight=False, soft_wrap=True, markup=False
        )
    if command.report is not None:
        from loraloom.report.builders import intruder_report

        points = [] if scales is None else swept.points
        save_report(intruder_report(found, typed, sweep=points), command.report, console)
    if command.out is not None:
        command.publish(command.out, console)
    if command.json:
        print(json.dumps(result))


def _find(command: Intruders, typed: str, console: Console) -> "IntruderReport":
    with console.status("Loading PyTorch"):
        from loraloom.intruders.stored import find_stored_intruders, reduce_stored_intruders
    assert command.adapter is not None
    options: dict[str, Any] = {"top_k": command.top_k, "epsilon": command.epsilon}
    with progress_on(console) as progress:
        if command.out is None:
            return find_stored_intruders(command.adapter, command.base, progress=progress, **options)
        return reduce_stored_intruders(
            command.adapter,
            command.out,
            command.base,
            command.scale,
            command.scope,
            command.rank,
            overwrite=command.overwrite,
            command=typed,
            progress=progress,
            **options,
        )


def _sweep(command: Intruders, scales: list[float], console: Console) -> "SweepReport":
    """The amounts that the files tell and, of a run, before them what its evaluations say."""
    with console.status("Loading PyTorch"):
        from loraloom.intruders.stored import sweep_stored
    assert command.adapter is not None
    options: dict[str, Any] = {"top_k": command.top_k, "epsilon": command.epsilon}
    options |= {"scope": command.scope, "rank": command.rank, "rewind": command.rewind}
    with progress_on(console) as progress:
        swept = sweep_stored(command.adapter, scales, command.base, progress=progress, **options)
    if not _is_run(command.adapter):
        return swept
    quiet_libraries()
    with console.status("Loading PyTorch and transformers"):
        from loraloom.training.evaluate import sweep_saved
    with console.status(f"Evaluating {len(swept.points)} scales"):
        measured = sweep_saved(Path(command.adapter), scales, **options)
    points = [
        replace(point, metrics={**there.metrics, **point.metrics}, error=there.error)
        for point, there in zip(swept.points, measured.points, strict=True)
    ]
    return replace(swept, points=points)


def _is_run(adapter: str) -> bool:
    return (Path(adapter) / "resolved.yaml").is_file()


def _scales(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(
            f"--sweep {text}: expected numbers with commas between them, such as 0.5,0.7,0.9", code="option-value"
        ) from None


def _summary(found: "IntruderReport") -> str:
    modules = sum(bool(layer.intruders) for layer in found.layers)
    if not modules:
        return f"No intruder dimension in {len(found.layers)} modules"
    return f"{found.count} intruder dimensions in {modules} of {len(found.layers)} modules"
