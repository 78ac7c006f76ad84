"""Tasks that put a head on an encoder: one loss per row or token, summed, and divided by what a whole step has of them.

transformers' Trainer infers from `**kwargs` in forward that a model divides its loss by `num_items_in_batch`.
Classification heads take that argument and ignore it: with n micro-batches, or n processes, gradients and loss come out
n times too large. So these tasks compute the loss from the logits: sum over the micro-batch / items of the whole step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer

from loraloom.training.config import DataSection
from loraloom.training.metrics import compute_metrics
from loraloom.training.tasks.base import (
    TEXT_TYPES,
    AnswerOptions,
    Parts,
    Setup,
    Task,
    batches,
    check_texts,
    holds,
    no_column,
    optional_column,
)
from loraloom.training.trainers import HeadTrainer


class HeadTask(Task):
    """A task whose model returns logits for labels."""

    peft_type: str | None = "SEQ_CLS"

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        """Sum over rows or tokens of their losses, scalar; labels of -100 count for nothing.

        Args:
            logits: (rows, ..., labels).
            labels: as the task's collator makes them.
            weights: factor of each class, (labels,).
            smoothing: share of a label that is spread over all of them.
        """
        raise NotImplementedError

    def decode(self, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> tuple[Any, Any]:
        """Predictions and references as the metrics take them."""
        raise NotImplementedError

    def class_weights(self, setup: Setup) -> torch.Tensor | None:
        """`training.class_weights` as a factor per class, (labels,); None without."""
        return None

    def encode(self, rows: Dataset, setup: Setup) -> Dataset:
        """The model's inputs and `labels`, unpadded."""
        raise NotImplementedError

    def collator(self, setup: Setup) -> Any:
        """Makes a batch of encoded rows."""
        return DataCollatorWithPadding(setup.processor)

    def trainer(self, setup: Setup, common: dict[str, Any]) -> Trainer:
        weights, names = self.class_weights(setup), setup.data.label_names
        smoothing = common["args"].label_smoothing_factor

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
            items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            own = None if weights is None else weights.to(logits.device)
            return self.loss_sum(logits, labels, own, smoothing) / items

        def metrics(outcome: EvalPrediction) -> dict[str, float]:
            # Some heads return more than logits; the logits come first.
            logits = outcome.predictions[0] if isinstance(outcome.predictions, tuple) else outcome.predictions
            labels = np.asarray(outcome.label_ids)
            total = self.loss_sum(torch.tensor(logits).double(), torch.tensor(labels), None, 0.0)
            found = {"loss": total.item() / int((labels != -100).sum())}
            return found | compute_metrics(setup.metrics, *self.decode(logits, labels, names))

        data = {name: self.encode(rows, setup) for name, rows in setup.data.parts.items()}
        return HeadTrainer(
            train_dataset=data["train"],
            eval_dataset=data.get("validation", data["test"]),
            test_dataset=data["test"],
            data_collator=self.collator(setup),
            compute_loss_func=loss,
            compute_metrics=metrics,
            **common,
        )


class TextHeadTask(HeadTask):
    """A head on an encoder of texts, or of pairs of them: columns `text`, `text_pair` (with pairs) and `label`."""

    auto = "AutoModelForSequenceClassification"

    def text_columns(self, section: DataSection, rows: Dataset, label: str | None) -> list[str]:
        """The text column, and the second one of pairs.

        Raises:
            InputError: a column is missing, or several columns of texts could be meant.
        """
        found = rows.column_names
        text = optional_column(section, "text_column", found, ("text",))
        pair = optional_column(section, "text_pair_column", found, ("text_pair",))
        if text is None:
            others = [
                c for c, feature in rows.features.items() if holds(feature, TEXT_TYPES) and c not in (label, pair)
            ]
            if len(others) == 2 and pair is None:
                raise _pair_or_one(section, others)
            if len(others) != 1:
                raise no_column(section, "text", found, "text_column")
            text = others[0]
        return [text] if pair is None else [text, pair]

    def text_rows(self, section: DataSection, parts: Parts, label: str) -> dict[str, dict[str, list]]:
        """The checked texts of each part."""
        columns = self.text_columns(section, parts["train"], label)
        names = ("text", "text_pair")[: len(columns)]
        return {
            part: {name: check_texts(rows, part, column) for name, column in zip(names, columns, strict=True)}
            for part, rows in parts.items()
        }

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        columns = [check_texts(rows, "given", name) for name in self.text_columns(section, rows, None)]
        return columns[0] if len(columns) == 1 else [list(pair) for pair in zip(*columns, strict=True)]

    def encode(self, rows: Dataset, setup: Setup) -> Dataset:
        encoded = setup.processor(*_texts(rows), truncation=True, max_length=setup.max_length)
        return Dataset.from_dict({**encoded, "labels": rows["label"][:]})

    def lengths(self, setup: Setup, rows: Dataset) -> list[int]:
        return [len(ids) for ids in setup.processor(*_texts(rows), truncation=False, verbose=False)["input_ids"]]

    @torch.no_grad()
    def logits(
        self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        """(row, its logits) in order. A row is a text, or a pair of them."""
        model.eval()
        for batch in batches(rows, options.batch_size):
            texts = [[row] if isinstance(row, str) else row for row in batch]
            columns = [list(column) for column in zip(*texts, strict=True)]
            inputs = processor(
                *columns, truncation=True, max_length=options.max_length, padding=True, return_tensors="pt"
            )
            yield from zip(batch, model(**inputs.to(model.device)).logits.float().cpu(), strict=True)


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """Sum of cross-entropies of logits (..., classes) to labels (...); -100 counts for nothing."""
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long(),
        weight=weights,
        reduction="sum",
        label_smoothing=smoothing,
    )


def class_weights(chosen: Any, labels: Sequence[int], names: list[str]) -> torch.Tensor | None:
    """`training.class_weights` as a factor per class, (classes,).

    Args:
        chosen: None, "balanced", or label to weight.
        labels: ids in the training rows; what is not a class (-100) is left out.
        names: of the classes.

    Raises:
        InputError: a label that is not there, or a class without a row to balance.
    """
    from sklearn.utils.class_weight import compute_class_weight

    from loraloom.errors import InputError
    from loraloom.text import did_you_mean

    if chosen is None:
        return None
    if chosen == "balanced":
        ids = np.asarray([label for label in labels if label >= 0])
        present = np.unique(ids)
        weights = np.ones(len(names))
        weights[present] = compute_class_weight("balanced", classes=present, y=ids)
        return torch.tensor(weights, dtype=torch.float32)
    for name in chosen:
        if str(name) not in names:
            raise InputError(
                f"training.class_weights: label {name!r} is none of {', '.join(names)}{did_you_mean(str(name), names)}",
                code="unknown-label",
            )
    given = {str(name): float(weight) for name, weight in chosen.items()}
    return torch.tensor([given.get(name, 1.0) for name in names])


def _texts(rows: Dataset) -> list[list[str]]:
    return [rows[name][:] for name in ("text", "text_pair") if name in rows.column_names]


def _pair_or_one(section: DataSection, columns: list[str]) -> Exception:
    from loraloom.errors import InputError

    one, other = columns
    return InputError(
        f"data.path {section.path!r}: two columns of texts, {one!r} and {other!r}: for pairs set data.text_column "
        f"{one} and data.text_pair_column {other}; to read one of them alone, set data.text_column",
        code="two-text-columns",
    )
