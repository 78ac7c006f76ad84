"""A trainer's model on the test and validation set: metrics, and the answers behind them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from transformers import Trainer

from loraloom.training.config import CLASSIFICATION
from loraloom.training.tasks import get_task
from loraloom.training.tasks.base import AnswerOptions, Setup
from loraloom.training.trainers import HeadTrainer

EXAMPLES = 20
WRITING = ("causal-lm", "seq2seq-lm")
SAMPLES, SAMPLE_TOKENS = 3, 40  # test rows that a writing model is asked, and how much it may write to each


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


def sample_answers(trainer: Trainer, setup: Setup) -> list[dict[str, str]]:
    """What the model writes to the first test rows: `prompt`, `expected`, `answer`; [] where the task writes no text.

    Greedy, so that nothing of the run's random numbers is used. A sharded model is not asked.
    """
    if setup.config.model.task not in WRITING or trainer.is_fsdp_enabled or not trainer.is_world_process_zero():
        return []
    asked = [_prompt(row) for row in setup.data.test.select(range(min(SAMPLES, len(setup.data.test))))]
    options = AnswerOptions(setup.max_length, max_new_tokens=SAMPLE_TOKENS)
    model = trainer.accelerator.unwrap_model(trainer.model)
    answers = get_task(setup.config.model.task).answer(model, setup.processor, [prompt for prompt, _ in asked], options)
    return [
        {"prompt": _plain(prompt), "expected": expected, "answer": answer["text"]}
        for (prompt, expected), answer in zip(asked, answers, strict=True)
    ]


def _prompt(row: dict[str, Any]) -> tuple[Any, str]:
    """(what to ask, what the row says): of a plain text its first half and its second."""
    if "source" in row:
        return row["source"], row["target"]
    if "messages" in row:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" or not i)
        return row["messages"][:last], row["messages"][last]["content"]
    if "completion" in row:
        return row["prompt"], _plain(row["completion"])
    words = row["text"].split()
    half = max(1, len(words) // 2)
    return " ".join(words[:half]), " ".join(words[half:])


def _plain(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


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
