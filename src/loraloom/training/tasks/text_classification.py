"""text-classification: one label of several for a text or a pair of texts; cross-entropy, accuracy and macro-F1."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from loraloom.card import ANSWERS
from loraloom.errors import InputError
from loraloom.training.config import DataSection
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, RunData, Setup, named_column
from loraloom.training.tasks.heads import TextHeadTask, class_weights, cross_entropy_sum
from loraloom.training.tasks.labels import label_ids, label_names


class TextClassification(TextHeadTask):
    """Columns `text`, `text_pair` (with pairs) and `label` (id)."""

    usage = ANSWERS["AutoModelForSequenceClassification"]

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        label = named_column(section, "label_column", parts["train"].column_names, ("label", "labels"))
        texts = self.text_rows(section, parts, label)
        names = label_names(parts["train"], label)
        made = {
            part: Dataset.from_dict({**texts[part], "label": label_ids(rows, part, label, names)})
            for part, rows in parts.items()
        }
        return Rows(made, [*self.text_columns(section, parts["train"], label), label], names)

    def check(self, section: DataSection, data: RunData) -> None:
        check_classes(section, data)

    def model_options(self, data: RunData) -> dict[str, Any]:
        return label_options(data)

    def class_weights(self, setup: Setup) -> torch.Tensor | None:
        chosen = setup.config.training.get("class_weights")
        return class_weights(chosen, setup.data.train["label"][:], setup.data.label_names)

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return cross_entropy_sum(logits, labels, weights, smoothing)

    def decode(self, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> tuple[Any, Any]:
        return np.argmax(logits, axis=-1), labels

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        for _, logits in self.logits(model, processor, rows, options):
            yield ranked(logits, model.config.id2label)


def check_classes(section: DataSection, data: RunData) -> None:
    """Raises InputError where every training row has the same label."""
    present = set(data.train["label"][:])
    if len(present) < 2:
        only = data.label_names[present.pop()]
        raise InputError(
            f"data.path {section.path!r}: every training row has label {only!r}; expected two or more",
            code="one-label",
        )


def label_options(data: RunData) -> dict[str, Any]:
    """The labels' names for the model's configuration, where a program that loads the model looks for them."""
    names = data.label_names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def ranked(logits: torch.Tensor, names: dict[int, str]) -> dict[str, Any]:
    """The label, and the probability of each label, the likeliest first."""
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    return {"label": names[order[0]], "probabilities": {names[i]: round(probabilities[i].item(), 4) for i in order}}


TASK = TextClassification()
