"""`AdapterSelection` in transformers' Trainer, and its outcome as a table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loraloom.errors import InputError
from loraloom.selection.selection import AdapterSelection
from loraloom.text import place, text_table


class SelectionCallback(TrainerCallback):
    """Tells the selection how long the run is, and saves ``selection.json`` in every checkpoint and at the end.

    Args:
        selection: made with the optimizer that the Trainer gets, ``Trainer(..., optimizers=(optimizer, None))``. To
            resume, call ``selection.restore(checkpoint)`` before ``trainer.train(resume_from_checkpoint=checkpoint)``.
        log: ``trainer.log``, to send the gates to the tracker with each logged loss.
    """

    def __init__(self, selection: AdapterSelection, log: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.selection, self.log = selection, log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end:
            raise InputError(
                "load_best_model_at_end=True may load a checkpoint with other adapters than the model then has: set it "
                "to False, and load the checkpoint you want afterwards",
                code="best-model",
            )
        self.selection.start(state.max_steps)
        if self.selection.step != state.global_step:
            raise InputError(
                f"the Trainer is at step {state.global_step}, the selection at step {self.selection.step}: call "
                "selection.restore(checkpoint) before trainer.train(resume_from_checkpoint=checkpoint)",
                code="not-restored",
            )
        # With several adapters the Trainer's loading ends in set_adapter, which makes all of this one trainable.
        self.selection.freeze(self.selection.frozen)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Logging calls this again; only the Trainer's own training log has a loss.
        if self.log is not None and logs is not None and "loss" in logs and (gates := self.selection.gates()):
            self.log({f"gates/{name}": value for name, value in gates.items()})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.selection.save(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.selection.save(str(args.output_dir))


def format_selection(selection: AdapterSelection) -> str:
    """The kept adapters as a table of text: a row per layer, a column per module, the last gate seen in each cell.

    A module that was dropped shows as a dot; a line below gives the counts and ranks.
    """
    last: dict[str, float] = {}
    for record in selection.history:
        last |= {n: g for n, g in zip(selection.modules, record["gates"], strict=True) if g is not None}
    kept = selection.kept
    rows: dict[str, dict[str, str]] = {}
    for name in selection.modules:
        layer, module = place(name)
        rows.setdefault(layer, {})[module] = f"{last.get(name, 1.0):.2f}" if name in kept else "."
    columns = list(dict.fromkeys(module for cells in rows.values() for module in cells))
    table = [["layer", *columns], *([layer, *(cells.get(c, "") for c in columns)] for layer, cells in rows.items())]
    ranks = ", ".join(str(r) for r in sorted(set(kept.values())))
    return "\n".join(
        [text_table(table, left=0), f"{len(kept)} of {len(selection.modules)} adapters kept, rank {ranks}"]
    )
