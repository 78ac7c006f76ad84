"""Checkpoints that are complete or not there: a mark when everything is written, then the rotation of old ones.

transformers' Trainer removes old checkpoints before its callbacks write theirs, and leaves half a checkpoint after a
kill. Here `complete.json` is written last, by a rename, and only then an old checkpoint goes.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from loraloom.io.files import write_text_atomically

COMPLETE = "complete.json"


class CheckpointCallback(TrainerCallback):
    """Marks checkpoints as complete and removes old ones; to be added last, as others write into them too.

    Args:
        trainer: takes the rotation over from it.
        seconds: gives the run's wall time so far, which a resumed run goes on counting.
    """

    def __init__(self, trainer: Trainer, seconds: Callable[[], float]) -> None:
        self.trainer, self.seconds = trainer, seconds
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_text_atomically(folder / COMPLETE, json.dumps({"seconds": round(self.seconds(), 2)}) + "\n")
        rotate_checkpoints(str(args.output_dir), self.limit, state.best_model_checkpoint, use_mtime=True)


def last_checkpoint(folder: Path, notice: Callable[[str], None]) -> Path | None:
    """The last complete checkpoint.

    Args:
        folder: of the checkpoints.
        notice: gets a sentence for each later one that was not written to its end.
    """
    found = [Path(path) for path in sort_checkpoints(str(folder))] if folder.is_dir() else []
    for checkpoint in reversed(found):
        if (checkpoint / COMPLETE).is_file():
            return checkpoint
        notice(f"{checkpoint} was not written to its end: skipped.")
    return None


class Clock:
    """Wall time of a run, over all its resumptions."""

    def __init__(self, checkpoint: Path | None = None) -> None:
        before = 0.0 if checkpoint is None else json.loads((checkpoint / COMPLETE).read_text())["seconds"]
        self.started = time.monotonic() - before

    def seconds(self) -> float:
        """Seconds since the run first started, without the time in which it was stopped."""
        return time.monotonic() - self.started
