"""What a run shows on the terminal: a bar while it works, a table of epochs, a table of results."""

import dataclasses
import statistics
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

from loraloom.optim import Memory
from loraloom.text import place, readable_bytes, score, short_names
from loraloom.training.checkpoints import Clock
from loraloom.training.composition import Composed
from loraloom.training.selection import Adapters

QUIET_SECONDS = 2.0  # work that is done sooner shows no bar


class TrainingDisplay(TrainerCallback):
    """A row per evaluation and, on a terminal, bars for training and evaluation.

    Args:
        console: where to draw; not a terminal: only the finished table.
        metrics: names of the evaluation's metrics, without `eval_`, in the order of the columns.
        clock: of the run; a resumed run goes on with its table and its time.
    """

    def __init__(self, console: Console, metrics: list[str], clock: Clock):
        self.console = console
        self.clock = clock
        self.metrics = metrics
        title = "on the validation set"
        self.table = Table(title=title, title_justify="left")
        for name in ("epoch", "step", "train loss", *(name.replace("_", " ") for name in metrics), "seconds"):
            self.table.add_column(name)
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
        for entry in state.log_history:  # of the part before a resumption
            self._row(entry, int(entry["step"]))
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
            self._row(logs, state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._remove("evaluation")
        if state.global_step and metrics:
            seconds = f"{self.clock.seconds():.0f}"
            self._row({"epoch": state.epoch or 0, **metrics}, state.global_step, seconds)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        self._remove("evaluation")

    def _row(self, entry: dict[str, Any], step: int, seconds: str = "") -> None:
        """Remember a logged loss, or add the row of an evaluation of the validation set."""
        if "loss" in entry:
            self.train_loss = score(float(entry["loss"]))
        if "eval_loss" in entry:
            values = [score(entry[f"eval_{name}"]) for name in self.metrics]
            self.table.add_row(f"{entry['epoch']:.2f}", str(step), self.train_loss, *values, seconds)


def results_table(rows: list[tuple[str, str]], title: str) -> Table:
    """Two columns, what and how much, under a title."""
    table = Table(title=title, show_header=False, title_justify="left")
    for what, value in rows:
        table.add_row(what, value)
    return table


def memory_table(memory: Memory, adamw: Memory) -> Table:
    """Weights, gradients and optimizer state of a run, beside those of AdamW on the same parameters if they differ."""
    compare = memory != adamw
    title = "Memory of the run, without activations"
    table = Table("", "bytes", "this run", title=title, title_justify="left")
    if compare:
        table.add_column("with AdamW")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(f.name, getattr(memory, f.name), getattr(adamw, f.name)) for f in dataclasses.fields(Memory)]
    total = None if memory.state is None else sum(row[1] for row in rows)
    rows.append(("total", total, sum(row[2] for row in rows)))
    for name, mine, theirs in rows:
        cells = ["unknown" if mine is None else f"{mine:,}", "" if mine is None else readable_bytes(mine)]
        table.add_row("optimizer state" if name == "state" else name, *cells, *[readable_bytes(theirs)] * compare)
    return table


def adapters_table(adapters: Adapters) -> Table:
    """Layers by modules: rank and last gate of each adapter that was kept, a dot for each that was dropped.

    A module is named by the shortest ending of its path that no other module of the table shares.
    """
    places = {name: place(name) for name in adapters}
    modules = short_names(module for _, module in places.values())
    headings = [heading.replace(".", "\n") for heading in modules.values()]
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
        layers.setdefault(place(name)[0], []).append(weights)
    for layer, modules in layers.items():
        of_members = ([weights[member] for weights in modules if member in weights] for member in composed.mean)
        table.add_row(layer, *(f"{statistics.fmean(w):.3f}" if w else "." for w in of_members))
    table.add_section()
    table.add_row("average", *(f"{weight:.3f}" for weight in composed.mean.values()))
    return table
