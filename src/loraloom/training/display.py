"""What a run shows on the terminal: a bar while it works, a table of epochs, a table of results."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraloom.training.composition import Composed
from loraloom.training.selection import Adapters

QUIET_SECONDS = 2.0  # work that is done sooner shows no bar


class TrainingDisplay(TrainerCallback):
    """A row per evaluation and, on a terminal, bars for training and evaluation.

    Args:
        console: where to draw; not a terminal: only the finished table.
        metrics: names of the evaluation's metrics, without `eval_`, in the order of the columns.
    """

    def __init__(self, console: Console, metrics: list[str]):
        self.console = console
        self.metrics = metrics
        self.table = Table("epoch", "step", "train loss", *(name.replace("_", " ") for name in metrics), "seconds")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bars: dict[str, tuple[TaskID, float]] = {}
        self.train_loss = ""
        self.started = time.monotonic()

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Draw for the time of the block; the table stays on the screen afterwards, the bars go."""
        if not self.console.is_terminal:
            yield
            if self.table.row_count:
                self.console.print(self.table)
            return
        with Live(Group(self.table, self.progress), console=self.console) as live:
            try:
                yield
            finally:
                live.update(self.table if self.table.row_count else "", refresh=True)

    def _advance(self, name: str, completed: int, total: int) -> None:
        if name not in self.bars:
            self.bars[name] = (self.progress.add_task(name, total=total, visible=False), time.monotonic())
        bar, since = self.bars[name]
        self.progress.update(bar, completed=completed, visible=time.monotonic() - since > QUIET_SECONDS)

    def _remove(self, name: str) -> None:
        if name in self.bars:
            self.progress.remove_task(self.bars.pop(name)[0])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic()
        self._advance("training", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._advance("training", state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._remove("training")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        done = self.progress.tasks[-1].completed if "evaluation" in self.bars else 0
        self._advance("evaluation", int(done) + 1, len(eval_dataloader))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.train_loss = f"{float(logs['loss']):.4f}"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._remove("evaluation")
        values = [f"{(metrics or {})[f'eval_{name}']:.4f}" for name in self.metrics]
        seconds = f"{time.monotonic() - self.started:.0f}"
        self.table.add_row(f"{state.epoch or 0:.2f}", str(state.global_step), self.train_loss, *values, seconds)


def results_table(rows: list[tuple[str, str]], title: str) -> Table:
    """Two columns, what and how much, under a title."""
    table = Table(title=title, show_header=False, title_justify="left")
    for what, value in rows:
        table.add_row(what, value)
    return table


def adapters_table(adapters: Adapters) -> Table:
    """Layers by modules: rank and last gate of each adapter that was kept, a dot for each that was dropped.

    A module is named by the shortest ending of its path that no other module of the table shares.
    """
    places = {name: _place(name) for name in adapters}
    modules = list(dict.fromkeys(module for _, module in places.values()))
    headings = [_shortest_ending(module, modules).replace(".", "\n") for module in modules]
    kept = sum(adapter is not None for adapter in adapters.values())
    title = f"{kept} of {len(adapters)} adapters kept: rank and gate"
    table = Table("layer", *headings, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for layer in dict.fromkeys(layer for layer, _ in places.values()):
        cells = dict.fromkeys(modules, "")
        for name, adapter in adapters.items():
            if places[name][0] == layer:
                cells[places[name][1]] = "." if adapter is None else f"{adapter['r']} {adapter['gate']:.2f}"
        table.add_row(layer, *cells.values())
    return table


def weights_table(composed: Composed) -> Table:
    """Layers by members: the mean weight of each member over the modules of the layer that it adapts, and over all."""
    table = Table("layer", *composed.mean, title="weights of the members", title_justify="left")
    layers: dict[str, list[dict[str, float]]] = {}
    for name, weights in composed.weights.items():
        layers.setdefault(_place(name)[0], []).append(weights)
    for layer, modules in layers.items():
        of_members = ([weights[member] for weights in modules if member in weights] for member in composed.mean)
        table.add_row(layer, *(f"{sum(w) / len(w):.3f}" if w else "." for w in of_members))
    table.add_section()
    table.add_row("average", *(f"{weight:.3f}" for weight in composed.mean.values()))
    return table


def _place(name: str) -> tuple[str, str]:
    """The number of a module's layer, or "-", and its name within the layer."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (match[1], match[2]) if match else ("-", name)


def _shortest_ending(module: str, modules: list[str]) -> str:
    parts = module.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((e for e in endings if sum(f".{m}".endswith(f".{e}") for m in modules) == 1), module)


def readable_bytes(count: int | None) -> str:
    """`1.50 GiB`, `2.0 MiB`; `unknown` for None."""
    if count is None:
        return "unknown"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
