"""`loraloom inspect ADAPTER`"""

import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraloom.cli.options import Reporting, parse, progress_on, save_report
from loraloom.errors import InputError, RunFailedError
from loraloom.text import printable

if TYPE_CHECKING:
    from loraloom.adapter.inspect import Inspection, LayerReport
    from loraloom.adapter.serving import Verdict

_STYLES = {"error": "bold red", "warning": "yellow"}
_EFFECTS = {"ok": "green", "wrong": "bold red", "rejected": "red", "varies": "yellow"}


@dataclass
class Inspect(Reporting):
    """Say what is in an adapter, what is wrong with it, and which server takes it. Builds no model.

    Exit code 1: it does nothing, its tensors do not resolve, or something else is wrong enough to stop.
    """

    adapter: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of an adapter of PEFT's LoRA or of loraloom."""
    base: str | None = None
    """Folder (or hub repository) of the base model: to resolve every module, and for ||dW|| / ||W||."""
    layers: Literal["all"] | int = 10
    """How many layers to list, broken ones first, then those that change the base most."""


def main(arguments: Sequence[str]) -> None:
    """Inspect, and show or print what was found.

    Raises:
        RunFailedError: there are errors among the findings.
    """
    command: Inspect = parse("inspect", Inspect, arguments)
    if command.adapter is None:
        raise InputError("inspect needs the folder of an adapter", code="usage")
    console = command.console()
    with console.status("Loading PyTorch"):
        from loraloom.adapter.inspect import inspect_adapter
    with progress_on(console) as progress:
        inspection = inspect_adapter(command.adapter, command.base, progress)
    show(inspection, console, command.layers)
    if command.report is not None:
        from loraloom.report.builders.adapter import inspection_report

        typed = shlex.join(["loraloom", "inspect", *arguments])
        save_report(inspection_report(inspection, typed), command.report, console)
    if command.json:
        print(json.dumps(inspection.to_dict()))
    if inspection.errors:
        more = f" (and {len(inspection.errors) - 1} more errors)" if len(inspection.errors) > 1 else ""
        raise RunFailedError(f"{command.adapter}: {inspection.errors[0].message}{more}", code="findings")


def show(inspection: "Inspection", console: Console, layers: Literal["all"] | int) -> None:
    """Draws the summary, the findings, the modules by kind, the first layers, and the serving table."""
    console.print(_summary(inspection), soft_wrap=True, highlight=False)
    for finding in inspection.findings:
        console.print(Text(printable(f"{finding.level}: {finding.message}"), _STYLES[finding.level]), soft_wrap=True)
    if inspection.layers:
        console.print(_kinds(inspection.layers))
        console.print(_layers(inspection.layers, len(inspection.layers) if layers == "all" else layers))
    console.print(_serving(inspection.serving), soft_wrap=True)


def _summary(inspection: "Inspection") -> Text:
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in inspection.ranks.items())
    dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in inspection.dtypes.items())
    others = f", {inspection.other_parameters:,} of them in {len(inspection.others)} tensors that are no update"
    return _plain(
        f"{inspection.path}: {inspection.method} (type {inspection.kind}) for {inspection.base or 'an unnamed base'}\n"
        f"{len(inspection.layers)} modules, rank {ranks}; {inspection.parameters:,} parameters"
        f"{others if inspection.others else ''}; {inspection.nbytes / 1e6:.1f} MB, {dtypes}"
    )


def _plain(text: str) -> Text:
    """Text that comes from files: neither escape sequences nor rich's markup in it are obeyed."""
    return Text(printable(text))


def _kinds(layers: list["LayerReport"]) -> Table:
    """One row per kind of module, the names without their layer's number: median and range of each number."""
    table = _table("modules", "r", "||D||", "dW/W", "effective rank", "stable rank", "zero", title="By kind")
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(layer.module.rpartition(".")[2], []).append(layer)
    for name, group in groups.items():
        columns = ("rank", "norm", "relative_norm", "effective_rank", "stable_rank")
        cells = [_spread([getattr(layer, column) for layer in group]) for column in columns]
        table.add_row(_plain(f"{len(group)} {name}"), *cells, str(sum(layer.zero is not None for layer in group)))
    return table


def _table(*columns: str, title: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.columns[0].overflow = "fold"
    return table


def _spread(values: list[float | None]) -> str:
    """Median and range of the values that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, middle, high = min(known), statistics.median(known), max(known)
    return f"{middle:.2g}" if low == high else f"{middle:.2g} ({low:.2g}-{high:.2g})"


def _layers(layers: list["LayerReport"], count: int) -> Table:
    def order(layer: "LayerReport") -> tuple:
        change = layer.relative_norm if layer.relative_norm is not None else layer.norm
        return layer.finite, layer.zero is None, -(change or 0.0)

    title = f"{min(count, len(layers))} of {len(layers)} layers, broken ones first, then by change"
    table = _table("module", "r", "gate", "||D||", "dW/W", "eff.", "stable", "", title=f"\n{title}")
    for layer in sorted(layers, key=order)[:count]:
        numbers = (layer.gate, layer.norm, layer.relative_norm, layer.effective_rank, layer.stable_rank)
        note = layer.zero or ("" if layer.finite else "NaN or infinity")
        cells = ["-" if number is None else f"{number:.2g}" for number in numbers]
        table.add_row(_plain(layer.module), str(layer.rank), *cells, Text(note, "red"))
    return table


def _serving(verdicts: list["Verdict"]) -> Text:
    text = Text("\nServing\n", end="")
    for verdict in verdicts:
        reasons = f" ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
        text.append_text(
            Text.assemble(f"{verdict.server}: ", (verdict.effect, _EFFECTS[verdict.effect]), printable(reasons))
        )
        text.append(f"\n  {printable(verdict.run)}\n")
    return text
