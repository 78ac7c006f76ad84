"""What a run leaves in its folder: the names of the files, and what metrics.json holds."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraloom.errors import InputError
from loraloom.training.composition import PORTABLE, Composed
from loraloom.training.folder import CHECKPOINTS, LOCK, RESOLVED, RESULT, STATE
from loraloom.training.selection import Adapters

__all__ = ["CHECKPOINTS", "LOCK", "PORTABLE", "RESOLVED", "RESULT", "STATE", "RunResult", "load_result"]


@dataclass(frozen=True)
class RunResult:
    """What metrics.json holds."""

    task: str
    method: str
    before: dict[str, float]
    """Metrics on the test set before training (a new head is random then)."""
    after: dict[str, float]
    """The same after training. Nothing in between has looked at the test set."""
    label_names: list[str]
    train_rows: int
    test_rows: int
    steps: int
    trainable_parameters: int
    total_parameters: int
    tokens_per_second: float
    """Tokens without padding, over the time of training without its evaluations; 0 where inputs are not tokens."""
    peak_memory_bytes: int | None
    """Allocated on the GPU where there is one, else resident memory of the process."""
    wall_time_seconds: float
    """Of all parts of a resumed run."""
    output_dir: str
    retention: dict[str, dict[str, float]] | None = None
    """With data.retention: its metrics "before" and "after"."""
    composition: Composed | None = None
    """composition: what it learned of the members."""
    adapters: Adapters | None = None
    """weightlora: rank and last gate of every adapter that was kept, null for one that was dropped, by module."""
    not_portable: str | None = None
    """Why the adapter, which is not of type LORA, has no copy of that type in portable/."""
    validation_rows: int = 0
    """Rows of the validation set, on which the evaluations of trainer_state.json (`eval_...`) are; 0: there is none."""
    validation: dict[str, float] | None = None
    """Metrics on it at the end: of the best model with load_best_model_at_end, else of the last evaluation."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the run read; see `loraloom.training.data_report.DataReport`."""
    warnings: list[str] = field(default_factory=list)
    """What to know before believing the numbers."""
    confusion: list[list[int]] | None = None
    """Classification: test rows by label (row) and prediction (column), in the order of label_names."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Test rows with the model's answer: of a classification those that are wrong with most confidence; of a task that
    writes text the first ones, with `prompt`, `expected`, and what it wrote `before` and `after` training."""


def load_result(folder: Path) -> RunResult:
    """The result of the run in a folder.

    Raises:
        InputError: the folder holds no finished run ("no-run").
    """
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no finished run: there is no {RESULT}", code="no-run") from None
    composed = values.get("composition")
    return RunResult(**{**values, "composition": None if composed is None else Composed(**composed)})
