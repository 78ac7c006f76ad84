"""A trainer's model on the test and validation set: metrics, and the answers behind them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from transformers import Trainer

from loraloom.training.config import CLASSIFICATION
from loraloom.training.tasks.base import Setup
from loraloom.training.trainers import HeadTrainer

EXAMPLES = 20


@dataclass(frozen=True)
class Evidence:
    """What the metrics come from."""

    predicted: list[str] | None = None
    """Names of the classes that are predicted at all; None where the task is not a classification."""
    confusion: list[list[int]] | None = None
    """Rows by label (row) and prediction (column)."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The wrong answers that the model was most sure of: row, label, answer, probability."""


def evaluate_test(trainer: Trainer, setup: Setup) -> tuple[dict[str, float], Evidence]:
    """The task's metrics on the test set, and what they come from."""
    rows = cast(Any, trainer).test_dataset
    if not isinstance(trainer, HeadTrainer):
        metrics = trainer.evaluate(rows, metric_key_prefix="test")
        return _named(metrics, "test", setup.metrics), Evidence()
    output = trainer.predict(rows, metric_key_prefix="test")
    evidence = Evidence()
    if setup.config.model.task in CLASSIFICATION:
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        evidence = _classified(logits, np.asarray(output.label_ids), setup)
    return _named(output.metrics or {}, "test", setup.metrics), evidence


def validation_metrics(trainer: Trainer, setup: Setup) -> dict[str, float] | None:
    """The metrics of the weights as they are on the validation set; None where there is none."""
    if setup.data.validation is None:
        return None
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    for entry in reversed(state.log_history):
        if "eval_loss" in entry and entry["step"] == step:
            return _named(entry, "eval", setup.metrics)
    return _named(trainer.evaluate(), "eval", setup.metrics)


def _named(metrics: dict[str, Any], prefix: str, names: Sequence[str]) -> dict[str, float]:
    return {name: metrics[f"{prefix}_{name}"] for name in names}


def _classified(logits: np.ndarray, labels: np.ndarray, setup: Setup) -> Evidence:
    from sklearn.metrics import confusion_matrix

    names, rows = setup.data.label_names, setup.data.test
    predictions = logits.argmax(-1)
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    sure = exponents.max(-1) / exponents.sum(-1)
    wrong = sorted(np.flatnonzero(predictions != labels).tolist(), key=lambda i: -sure[i])[:EXAMPLES]
    shown = [name for name in ("text", "text_pair") if name in rows.column_names]
    examples = [
        {
            **{name: rows[i][name] for name in shown},
            "row": i + 1,
            "label": names[labels[i]],
            "answer": names[predictions[i]],
            "probability": round(float(sure[i]), 4),
        }
        for i in wrong
    ]
    matrix = confusion_matrix(labels, predictions, labels=range(len(names)))
    return Evidence([names[i] for i in sorted(set(predictions.tolist()))], matrix.tolist(), examples)
