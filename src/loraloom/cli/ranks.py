"""`loraloom ranks MODEL DATA`"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
import yaml
from rich.table import Table
from rich.text import Text

from loraloom.cli.options import Output, parse, progress_on, quiet_libraries
from loraloom.cli.train import split_overrides
from loraloom.errors import InputError
from loraloom.io.files import write_text_atomically
from loraloom.text import place, printable
from loraloom.training.config import DataSection, ModelSection
from loraloom.training.load import load_config

if TYPE_CHECKING:
    from loraloom.ranks.ranks import RankReport


@dataclass
class Ranks(Output):
    """Choose target modules and a rank for each before training, by the gradients of a few batches.

    Prints what LoraConfig, LoomConfig and `method` in RUN.yaml take. Nothing is trained.
    """

    base: tyro.conf.Positional[str | None] = None
    """Folder (or hub repository) of the base model."""
    rows: tyro.conf.Positional[str | None] = None
    """What it will be trained on, as data.path of RUN.yaml."""
    rank: int | None = None
    """The budget: as many parameters as this rank in every module would take. Default: 8."""
    parameters: int | None = None
    """The budget in its place, in parameters of all factors together."""
    max_rank: int | None = None
    """The largest rank of any module. Default: four times the mean."""
    batches: int = 8
    """How many batches to take gradients of."""
    out: Path | None = None
    """File to write the configuration to, .yaml or .json; else it is printed."""
    overwrite: bool = False
    """Replace the file if it is there."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)


def main(arguments: Sequence[str]) -> None:
    """Choose ranks, show them, and write or print the configuration."""
    options, overrides = split_overrides(arguments)
    command: Ranks = parse("ranks", Ranks, options)
    if command.base is None or command.rows is None:
        raise InputError("ranks needs a model and the rows that it will be trained on", code="usage")
    out = command.out
    if out is not None and out.suffix not in (".yaml", ".yml", ".json"):
        raise InputError(f"--out {out}: expected a name that ends in .yaml or .json", code="suffix")
    if out is not None and out.exists() and not command.overwrite:
        raise InputError(f"--out {out} is there: choose another name, or pass --overwrite", code="not-empty")
    config = load_config(
        None, [("model.name", json.dumps(command.base)), ("data.path", json.dumps(command.rows)), *overrides]
    )
    quiet_libraries()
    console = command.console()
    with console.status("Loading PyTorch and transformers"):
        from loraloom.training.ranks import ranks_for_run
    with progress_on(console) as progress:
        report = ranks_for_run(
            config,
            command.batches,
            rank=command.rank,
            parameters=command.parameters,
            max_rank=command.max_rank,
            progress=progress,
        )
    console.print(_table(report))
    console.print(_summary(report), highlight=False, soft_wrap=True)
    text = _snippet(report.config(), shlex.join(["loraloom", "ranks", *arguments]), out)
    if out is not None:
        write_text_atomically(out, text)
        console.print(f"Written to {out}", highlight=False, soft_wrap=True, markup=False)
    elif not command.json:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if command.json:
        print(json.dumps(report.to_dict()))


def _snippet(config: dict[str, Any], typed: str, out: Path | None) -> str:
    if out is not None and out.suffix == ".json":
        return json.dumps(config, indent=2) + "\n"
    return f"# {typed}\n{yaml.safe_dump(config, sort_keys=False, width=120)}"


def _summary(report: "RankReport") -> str:
    chosen = sum(rank > 0 for rank in report.ranks.values())
    return (
        f"{chosen} of {len(report.ranks)} modules get a rank, {report.parameters:,} parameters in all, which hold "
        f"{report.share:.1%} of the gradients' energy ({report.batches} batches, mean loss {report.loss:.4g})"
    )


def _table(report: "RankReport") -> Table:
    """One row per kind of module: its name without the layer's number."""
    heads = ("modules", "of them with a rank", "ranks", "share of the energy", "of that kept")
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    table.columns[0].overflow = "fold"
    kinds: dict[str, list[str]] = {}
    for name in report.ranks:
        kinds.setdefault(place(name)[1], []).append(name)
    total = sum(report.energies.values())
    for kind, names in kinds.items():
        ranks = [rank for name in names if (rank := report.ranks[name])]
        energy = sum(report.energies[name] for name in names)
        kept = sum(report.energies[name] * report.kept[name] for name in names)
        spread = "-" if not ranks else f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"
        share = f"{kept / energy:.1%}" if energy else "-"
        label = Text(printable(f"{len(names)} {kind}"))
        table.add_row(label, str(len(ranks)), spread, f"{energy / total:.1%}", share)
    return table
