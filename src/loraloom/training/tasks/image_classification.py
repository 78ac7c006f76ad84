"""image-classification: one label of several for an image; cross-entropy, accuracy and macro-F1.

Rows are a folder with a folder of images for each label, or a data set with a column of images or of their paths.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoImageProcessor

from loraloom.card import ANSWERS
from loraloom.errors import InputError
from loraloom.training.config import DataSection
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, RunData, Setup, batches, named_column
from loraloom.training.tasks.heads import HeadTask, class_weights, cross_entropy_sum
from loraloom.training.tasks.labels import label_ids, label_names
from loraloom.training.tasks.text_classification import check_classes, label_options, ranked


class ImageClassification(HeadTask):
    """Columns `image` ({bytes, path}, decoded when a batch is made) and `label` (id)."""

    auto = "AutoModelForImageClassification"
    peft_type: str | None = None  # PEFT's wrapper of the other heads expects input_ids
    processor = "AutoImageProcessor"
    usage = ANSWERS["AutoModelForImageClassification"]

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        found = parts["train"].column_names
        image = named_column(section, "text_column", found, ("image", "img", "pixel_values", "path"))
        label = named_column(section, "label_column", found, ("label", "labels", "fine_label"))
        names = label_names(parts["train"], label)
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        made = {
            part: Dataset.from_dict(
                {"image": _images(rows, part, image), "label": label_ids(rows, part, label, names)}, features=features
            )
            for part, rows in parts.items()
        }
        return Rows(made, [image, label], names)

    def check(self, section: DataSection, data: RunData) -> None:
        check_classes(section, data)

    def model_options(self, data: RunData) -> dict[str, Any]:
        return {**label_options(data), "ignore_mismatched_sizes": True}  # a head for other labels is replaced

    def load_processor(self, path: str) -> Any:
        return AutoImageProcessor.from_pretrained(path, use_fast=False)

    def argument_defaults(self, config: Any, max_length: int) -> dict[str, Any]:
        return {"remove_unused_columns": False, "include_num_input_tokens_seen": "no"}

    def class_weights(self, setup: Setup) -> torch.Tensor | None:
        chosen = setup.config.training.get("class_weights")
        return class_weights(chosen, setup.data.train["label"][:], setup.data.label_names)

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        column = named_column(section, "text_column", rows.column_names, ("path", "image", "img", "text"))
        return [value["path"] if isinstance(value, dict) else value for value in _images(rows, "given", column)]

    def encode(self, rows: Dataset, setup: Setup) -> Dataset:
        return rows.rename_column("label", "labels")

    def collator(self, setup: Setup) -> Any:
        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            pixels = _pixels([row["image"] for row in rows], setup.processor)
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return cross_entropy_sum(logits, labels, weights, smoothing)

    def decode(self, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> tuple[Any, Any]:
        return np.argmax(logits, axis=-1), labels

    @torch.no_grad()
    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        model.eval()
        for batch in batches(rows, options.batch_size):
            images = [{"path": str(path), "bytes": None} for path in batch]
            for logits in model(pixel_values=_pixels(images, processor).to(model.device)).logits.float().cpu():
                yield ranked(logits, model.config.id2label)


def _pixels(images: list[dict[str, Any]], processor: Any) -> torch.Tensor:
    """Images as the model's input, (n, channels, height, width)."""
    from PIL import Image

    opened = [Image.open(io.BytesIO(one["bytes"]) if one["bytes"] else one["path"]).convert("RGB") for one in images]
    return processor(opened, return_tensors="pt")["pixel_values"]


def _images(rows: Dataset, part: str, column: str) -> list[dict[str, Any]]:
    """Each row's image as {bytes, path}."""
    if column not in rows.column_names:
        raise InputError(
            f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}", code="no-column"
        )
    if isinstance(rows.features[column], datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))[column][:]
    found = []
    for number, value in enumerate(rows[column][:], 1):
        if not isinstance(value, str) or not Path(value).is_file():
            raise InputError(
                f"row {number} of the {part} set has {value!r} in column {column!r}; expected an image, or its path",
                code="no-image",
            )
        found.append({"bytes": None, "path": value})
    return found


TASK = ImageClassification()
