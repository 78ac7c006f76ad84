"""multi-label: any number of labels for a text; one logistic loss per label, micro- and macro-F1 at probability 1/2."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional as F

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import DataSection
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, RunData, named_column
from loraloom.training.tasks.heads import TextHeadTask
from loraloom.training.tasks.text_classification import label_options


class MultiLabel(TextHeadTask):
    """Columns `text`, `text_pair` (with pairs) and `label`: a 1.0 or 0.0 for each label."""

    usage = (
        'logits = model(**processor("A text.", return_tensors="pt")).logits[0]\n'
        "print([config.id2label[i] for i, logit in enumerate(logits.tolist()) if logit > 0])"
    )

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        label = named_column(section, "label_column", parts["train"].column_names, ("label", "labels"))
        texts = self.text_rows(section, parts, label)
        lists = {part: _lists(rows, part, label) for part, rows in parts.items()}
        names = _names(parts["train"], label, lists["train"])
        made = {part: Dataset.from_dict({**texts[part], "label": _vectors(lists[part], part, names)}) for part in parts}
        return Rows(made, [*self.text_columns(section, parts["train"], label), label], names)

    def check(self, section: DataSection, data: RunData) -> None:
        if not data.label_names:
            raise InputError(f"data.path {section.path!r}: no training row has a label", code="one-label")

    def model_options(self, data: RunData) -> dict[str, Any]:
        return {**label_options(data), "problem_type": "multi_label_classification"}

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")

    def decode(self, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> tuple[Any, Any]:
        return (logits > 0).astype(int), labels.astype(int)

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        names = model.config.id2label
        for _, logits in self.logits(model, processor, rows, options):
            probabilities = {names[i]: round(p, 4) for i, p in enumerate(logits.sigmoid().tolist())}
            yield {"labels": [name for name, p in probabilities.items() if p > 0.5], "probabilities": probabilities}


def _lists(rows: Dataset, part: str, column: str) -> list[list[Any]]:
    if column not in rows.column_names:
        raise InputError(
            f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}", code="no-column"
        )
    values = rows[column][:]
    for number, value in enumerate(values, 1):
        if not isinstance(value, list):
            raise InputError(
                f"row {number} of the {part} set has {value!r} in column {column!r}; expected a list of labels, "
                'such as ["one", "other"] or []',
                code="wrong-labels",
            )
    feature = getattr(rows.features[column], "feature", None)
    if isinstance(feature, ClassLabel):
        return [[feature.names[i] for i in value] for value in values]
    return [[str(label) for label in value] for value in values]


def _names(train: Dataset, column: str, lists: list[list[str]]) -> list[str]:
    feature = getattr(train.features[column], "feature", None)
    return list(feature.names) if isinstance(feature, ClassLabel) else sorted({name for row in lists for name in row})


def _vectors(lists: list[list[str]], part: str, names: list[str]) -> list[list[float]]:
    for number, row in enumerate(lists, 1):
        for label in row:
            if label not in names:
                raise InputError(
                    f"row {number} of the {part} set has label {label!r}; the training labels are {', '.join(names)}"
                    f"{did_you_mean(label, names)}",
                    code="unknown-label",
                )
    return [[float(name in row) for name in names] for row in lists]


TASK = MultiLabel()
