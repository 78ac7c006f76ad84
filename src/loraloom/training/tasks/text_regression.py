"""text-regression: a number for a text or a pair of texts; squared error, Pearson's and Spearman's correlation."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from loraloom.errors import InputError
from loraloom.training.config import DataSection
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, RunData, named_column
from loraloom.training.tasks.heads import TextHeadTask


class TextRegression(TextHeadTask):
    """Columns `text`, `text_pair` (with pairs) and `label` (float)."""

    usage = (
        'print(model(**processor("A text.", return_tensors="pt")).logits.item())  # of a pair: processor(text, other)'
    )

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        usual = ("score", "label", "labels", "similarity_score")
        label = named_column(section, "label_column", parts["train"].column_names, usual)
        texts = self.text_rows(section, parts, label)
        made = {
            part: Dataset.from_dict({**texts[part], "label": _numbers(rows, part, label)})
            for part, rows in parts.items()
        }
        return Rows(made, [*self.text_columns(section, parts["train"], label), label])

    def check(self, section: DataSection, data: RunData) -> None:
        values = set(data.train["label"][:])
        if len(values) < 2:
            raise InputError(
                f"data.path {section.path!r}: every training row has the number {values.pop()}; expected two or more",
                code="one-label",
            )

    def model_options(self, data: RunData) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return (logits[:, 0] - labels.to(logits.dtype)).square().sum()

    def decode(self, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> tuple[Any, Any]:
        return logits[:, 0], labels

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        for _, logits in self.logits(model, processor, rows, options):
            yield {"score": round(logits[0].item(), 4)}


def _numbers(rows: Dataset, part: str, column: str) -> list[float]:
    if column not in rows.column_names:
        raise InputError(
            f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}", code="no-column"
        )
    values = rows[column][:]
    for number, value in enumerate(values, 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"row {number} of the {part} set has {value!r} in column {column!r}; expected a number",
                code="wrong-labels",
            )
    return [float(value) for value in values]


TASK = TextRegression()
