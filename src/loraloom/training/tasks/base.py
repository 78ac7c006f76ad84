"""The protocol of a task: what it reads, which model and trainer it needs, what it is judged by, how it answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import DataSection, RunConfig

TEXT_TYPES = ("string", "large_string")
Parts = Mapping[str, Dataset]
"""`train`, and `validation` and `test` where the source has them."""


@dataclass(frozen=True)
class RunData:
    """Rows in the columns of the task, and the names of the labels in the order of their ids (empty without labels)."""

    train: Dataset
    test: Dataset
    label_names: list[str]
    validation: Dataset | None = None
    ignored: tuple[str, ...] = ()
    """Columns of the source that the task does not read."""
    sources: dict[str, int] = field(default_factory=dict)
    """With `data.mix`: training rows from each set, by its path."""

    @property
    def parts(self) -> dict[str, Dataset]:
        """The parts that there are, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in every.items() if rows is not None}


@dataclass(frozen=True)
class Rows:
    """What a task makes of a source."""

    parts: dict[str, Dataset]
    """In the columns of the task."""
    read: list[str]
    """The source's columns that it reads."""
    label_names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """What a task makes its trainer from."""

    config: RunConfig
    data: RunData
    processor: Any
    """Tokenizer or image processor."""
    max_length: int
    metrics: list[str]
    retained: RunData | None = None
    """Rows of data.retention."""


class Task:
    """A task. Subclasses say what differs; each file of this package has one instance, `TASK`."""

    auto: str
    """Name of transformers' Auto class."""
    peft_type: str | None
    """PEFT's name of the task, which wraps the model; None: the plain PeftModel."""
    processor: str = "AutoTokenizer"
    """Name of transformers' Auto class of what makes the inputs; a card calls its instance `processor`."""
    usage: str
    """Python for a model card that asks `model` something and prints the answer; `config` has the labels' names."""
    arguments: type[TrainingArguments] = TrainingArguments

    @property
    def auto_class(self) -> Any:
        """transformers' Auto class."""
        return getattr(transformers, self.auto)

    def rows(self, section: DataSection, parts: Parts) -> "Rows":
        """The parts in the columns of the task.

        Raises:
            InputError: a column is missing, or a row does not hold what it must; the row is named.
        """
        raise NotImplementedError

    def check(self, section: DataSection, data: RunData) -> None:
        """Raises InputError where the split rows cannot be trained on."""

    def model_options(self, data: RunData) -> dict[str, Any]:
        """What from_pretrained needs for the head."""
        return {}

    def load_processor(self, path: str) -> Any:
        """The tokenizer, with a padding token in any case; or an image processor.

        Raises:
            OSError, ValueError: there is none under this name.
        """
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.pad_token is None:  # most language models have none; padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def argument_defaults(self, config: RunConfig, max_length: int) -> dict[str, Any]:
        """Training arguments that differ from those of the class."""
        return {}

    def trainer(self, setup: Setup, common: dict[str, Any]) -> Trainer:
        """The trainer.

        Args:
            setup: what to train on.
            common: arguments of every trainer: model, args, processing_class, callbacks, optimizer_cls_and_kwargs.

        Raises:
            InputError: the rows do not fit the model or its tokenizer.
        """
        raise NotImplementedError

    def lengths(self, setup: Setup, rows: Dataset) -> list[int]:
        """Tokens of each row before any is cut; empty where rows have no tokens."""
        return []

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        """What to ask of each row of a file that need not have answers, for `answer`.

        Raises:
            InputError: a column is missing, or a row does not hold what it must.
        """
        raise NotImplementedError

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: "AnswerOptions") -> Iterator[dict]:
        """What the model says to each row: a dict of plain values per row, in order."""
        raise NotImplementedError


@dataclass(frozen=True)
class AnswerOptions:
    """How `Task.answer` goes about it."""

    max_length: int
    max_new_tokens: int = 128
    batch_size: int = 32
    temperature: float = 0.0
    """0: greedy."""


def optional_column(section: DataSection, key: str, found: Sequence[str], usual: Sequence[str]) -> str | None:
    """The column that `data.KEY` names, or the first of the usual ones that is there, or None.

    Raises:
        InputError: the named column is not there.
    """
    column = getattr(section, key)
    if column is None:
        return next((name for name in usual if name in found), None)
    if column not in found:
        raise no_column(section, column, found, key)
    return column


def named_column(section: DataSection, key: str, found: Sequence[str], usual: Sequence[str]) -> str:
    """As `optional_column`.

    Raises:
        InputError: the named column is not there, or none is named and no usual one is there.
    """
    column = optional_column(section, key, found, usual)
    if column is None:
        raise no_column(section, usual[0], found, key)
    return column


def no_column(section: DataSection, column: str, found: Sequence[str], key: str) -> InputError:
    """The error for a column that is not there."""
    near = did_you_mean(column, found)
    return InputError(
        f"data.path {section.path!r}: no column {column!r} among {', '.join(found)}; set data.{key}{near}",
        code="no-column",
    )


def holds(feature: Any, types: tuple[str, ...]) -> bool:
    """Whether a column holds plain values of one of these types; a list or a record does not."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(types)


def check_texts(rows: Dataset, part: str, column: str) -> list[str]:
    """The column's texts.

    Raises:
        InputError: the column is missing, or a row of it holds no text; rows are counted from 1.
    """
    if column not in rows.column_names:
        raise InputError(
            f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}", code="no-column"
        )
    values = rows[column][:]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"row {number} of the {part} set has {value!r} in column {column!r}; expected a text", code="no-text"
            )
    return values


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The rows, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
