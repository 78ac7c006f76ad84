"""Labels of a classification: their names, in order, and each row's id."""

from typing import Any

import datasets
from datasets import Dataset

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.tasks.base import TEXT_TYPES, Parts, holds

SHOWN = 20  # labels that an error lists


def label_names(train: Dataset, column: str) -> list[str]:
    """Names in the order of their ids: the data set's own where it has them, else the sorted labels of train.

    Raises:
        InputError: the column holds neither integers nor strings, or both.
    """
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = set() if isinstance(feature, datasets.List) else set(map(_hashable, train[column][:])) - {None}
    if not holds(feature, (*TEXT_TYPES, "int", "uint", "bool")) and not values:
        raise _wrong_kind(column, _kind(feature), "expected integer or string labels")
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        shown = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise _wrong_kind(column, f"labels of {len(kinds)} types, {shown}", "write them all as strings, or as integers")
    if kinds - {str, int, bool}:
        raise _wrong_kind(column, _kind(feature), "expected integer or string labels")
    return [str(value) for value in sorted(values)]


def label_ids(rows: Dataset, part: str, column: str, names: list[str]) -> list[int]:
    """The id of each row's label.

    Raises:
        InputError: the column is missing, or a row has a label that train does not have; rows are counted from 1.
    """
    if column not in rows.column_names:
        raise InputError(
            f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}", code="no-column"
        )
    return [_id(value, number, part, names) for number, value in enumerate(_named(rows, column), 1)]


def _id(value: Any, number: int, part: str, names: list[str]) -> int:
    if value in names:
        return names.index(value)
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    raise InputError(
        f"row {number} of the {part} set has label {value!r}; the training labels are {listed}"
        f"{did_you_mean(str(value), names)}",
        code="unknown-label",
    )


def _named(rows: Dataset, column: str) -> list[Any]:
    """The labels as names; None stays None, and a ClassLabel's -1 (hidden) is None."""
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else None for value in values]
    return [None if value is None else str(value) for value in values]


def labels_are_hidden(rows: Dataset, column: str) -> bool:
    """Whether no row has a label: hub data sets hide those of a test set as -1 or null."""
    return column not in rows.column_names or all(value in (None, -1) for value in rows[column][:])


def classes_of(parts: Parts, column: str) -> list[str]:
    """The names of the labels, from the training rows."""
    return label_names(parts["train"], column)


def _hashable(value: Any) -> Any:
    return None if isinstance(value, list | dict) else value


def _kind(feature: Any) -> str:
    if isinstance(feature, datasets.List | list):
        return "lists"
    return getattr(feature, "dtype", None) or "records"


def _wrong_kind(column: str, kind: str, expected: str) -> InputError:
    return InputError(f"column {column!r} holds {kind}; {expected}", code="wrong-labels")
