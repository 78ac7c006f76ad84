"""token-classification: a tag for each word; cross-entropy at the first token of a word, entities scored by seqeval.

Tags are B-X, I-X and O, as seqeval reads them; a tag without a prefix is an entity of one word.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import DataCollatorForTokenClassification

from loraloom.card import ANSWERS
from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import DataSection
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, RunData, Setup, batches, named_column
from loraloom.training.tasks.heads import HeadTask, class_weights, cross_entropy_sum
from loraloom.training.tasks.text_classification import label_options

WORDS = ("tokens", "words", "text")


class TokenClassification(HeadTask):
    """Columns `words` (list of str) and `label` (list of ids)."""

    auto = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    usage = ANSWERS["AutoModelForTokenClassification"]

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        found = parts["train"].column_names
        words = named_column(section, "text_column", found, WORDS)
        tags = named_column(section, "label_column", found, ("tags", "ner_tags", "labels", "label", "pos_tags"))
        read = {part: _read(rows, part, words, tags) for part, rows in parts.items()}
        feature = getattr(parts["train"].features[tags], "feature", None)
        if isinstance(feature, ClassLabel):
            names = list(feature.names)
        else:
            names = sorted({tag for _, row in read["train"] for tag in row})
        made = {
            part: Dataset.from_dict({"words": [one for one, _ in pairs], "label": _ids(pairs, part, names)})
            for part, pairs in read.items()
        }
        return Rows(made, [words, tags], names)

    def check(self, section: DataSection, data: RunData) -> None:
        if len({tag for row in data.train["label"] for tag in row}) < 2:
            raise InputError(f"data.path {section.path!r}: every word has the same tag", code="one-label")

    def model_options(self, data: RunData) -> dict[str, Any]:
        return label_options(data)

    def class_weights(self, setup: Setup) -> torch.Tensor | None:
        tags = [tag for row in setup.data.train["label"] for tag in row]
        return class_weights(setup.config.training.get("class_weights"), tags, setup.data.label_names)

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        return rows[named_column(section, "text_column", rows.column_names, WORDS)][:]

    def encode(self, rows: Dataset, setup: Setup) -> Dataset:
        encoded = setup.processor(
            rows["words"][:], is_split_into_words=True, truncation=True, max_length=setup.max_length
        )
        labels = [_at_first_tokens(encoded.word_ids(i), tags) for i, tags in enumerate(rows["label"])]
        return Dataset.from_dict({**encoded, "labels": labels})

    def collator(self, setup: Setup) -> Any:
        return DataCollatorForTokenClassification(setup.processor)

    def lengths(self, setup: Setup, rows: Dataset) -> list[int]:
        encoded = setup.processor(rows["words"][:], is_split_into_words=True, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return cross_entropy_sum(logits, labels, weights, smoothing)

    def decode(self, logits: np.ndarray, labels: np.ndarray, names: list[str]) -> tuple[Any, Any]:
        predicted, counted = np.argmax(logits, axis=-1), labels != -100
        return tuple(
            [[names[i] for i in row[which]] for row, which in zip(ids, counted, strict=True)]
            for ids in (predicted, labels)
        )  # type: ignore[return-value]

    @torch.no_grad()
    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        model.eval()
        names = model.config.id2label
        for batch in batches(rows, options.batch_size):
            words = [row.split() if isinstance(row, str) else list(row) for row in batch]
            inputs = processor(
                words,
                is_split_into_words=True,
                truncation=True,
                max_length=options.max_length,
                padding=True,
                return_tensors="pt",
            )
            predicted = model(**inputs.to(model.device)).logits.argmax(-1).tolist()
            for i, row in enumerate(words):
                ids = _at_first_tokens(inputs.word_ids(i), [0] * len(row))
                tags = [names[tag] for tag, which in zip(predicted[i], ids, strict=True) if which != -100]
                yield {"words": row, "tags": tags}


def _at_first_tokens(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """The word's tag at its first token, -100 at every other token."""
    before = [None, *word_ids[:-1]]
    return [
        tags[word] if word is not None and word != last else -100 for word, last in zip(word_ids, before, strict=True)
    ]


def _read(rows: Dataset, part: str, words: str, tags: str) -> list[tuple[list[str], list[str]]]:
    for column in (words, tags):
        if column not in rows.column_names:
            raise InputError(
                f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}", code="no-column"
            )
    feature = getattr(rows.features[tags], "feature", None)
    found = []
    for number, (one, other) in enumerate(zip(rows[words][:], rows[tags][:], strict=True), 1):
        if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other) or not one:
            raise InputError(
                f"row {number} of the {part} set: columns {words!r} and {tags!r} must be lists of one length, of words "
                "and of their tags",
                code="wrong-labels",
            )
        named = (
            [feature.names[tag] for tag in other] if isinstance(feature, ClassLabel) else [str(tag) for tag in other]
        )
        found.append(([str(word) for word in one], named))
    return found


def _ids(pairs: list[tuple[list[str], list[str]]], part: str, names: list[str]) -> list[list[int]]:
    for number, (_, row) in enumerate(pairs, 1):
        for tag in row:
            if tag not in names:
                raise InputError(
                    f"row {number} of the {part} set has tag {tag!r}; the training tags are {', '.join(names)}"
                    f"{did_you_mean(tag, names)}",
                    code="unknown-label",
                )
    return [[names.index(tag) for tag in row] for _, row in pairs]


TASK = TokenClassification()
