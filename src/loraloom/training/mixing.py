"""Several training sets as one: `data.path` with the sets of `data.mix`, each with its share of the rows."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets, interleave_datasets

from loraloom.errors import InputError

SEED = 0  # of the draws that say which set the next row comes from
STRATEGIES = {"first": "first_exhausted", "all": "all_exhausted"}


def joined(first: Dataset, others: Mapping[str, Dataset]) -> Dataset:
    """The rows of all sets one after the other, in the columns that all of them have.

    Args:
        first: its types hold for all.
        others: `data.mix`'s sets, by path.

    Raises:
        InputError: a set has no column in common with the first, or holds something else or other classes in one.
    """
    columns = [name for name in first.column_names if all(name in rows.column_names for rows in others.values())]
    if not columns:
        path, rows = next(iter(others.items()))
        raise InputError(
            f"data.mix {path!r}: has columns {', '.join(rows.column_names)}, data.path has "
            f"{', '.join(first.column_names)}: give all sets the same columns",
            code="other-columns",
        )
    parts = [first.select_columns(columns)]
    for path, rows in others.items():
        for name in columns:  # a cast keeps the numbers, whatever they are the numbers of
            own, its = (_classes(features[name]) for features in (first.features, rows.features))
            if its not in (None, own):
                raise InputError(
                    f"data.mix {path!r}: column {name!r} has the classes {its}, data.path {own or 'none'}: give all "
                    "sets the same classes in the same order, or the labels as words",
                    code="other-classes",
                )
        try:
            parts.append(rows.select_columns(columns).cast(parts[0].features))
        except (ValueError, TypeError) as error:  # Arrow's errors are ValueErrors
            raise InputError(
                f"data.mix {path!r}: holds other values than data.path in {', '.join(columns)} "
                f"({' '.join(str(error).split())[:200]})",
                code="other-columns",
            ) from error
    return concatenate_datasets(parts)


def _classes(feature: Any) -> list[str] | None:
    """The names that a column's numbers stand for, in a list or alone; None of other columns."""
    while not isinstance(feature, ClassLabel):
        if (feature := getattr(feature, "feature", None)) is None:
            return None
    return feature.names


def mixed(sets: Sequence[Dataset], shares: Sequence[float], until: str) -> tuple[Dataset, list[int]]:
    """Rows drawn from the sets by their shares, with a fixed seed, each set's in its own order.

    Args:
        sets: in the same columns.
        shares: of the rows, sum 1.
        until: "first": the end of the first set that has no more rows, so that no row comes twice; "all": every row
            has come, and shorter sets begin anew.

    Returns:
        The rows, and for each the number of its set.
    """
    starts = [sum(map(len, sets[:i])) for i in range(len(sets))]
    numbered = [
        Dataset.from_dict({"row": range(start, start + len(rows))}) for start, rows in zip(starts, sets, strict=True)
    ]
    strategy: Any = STRATEGIES[until]
    order = interleave_datasets(numbered, probabilities=list(shares), seed=SEED, stopping_strategy=strategy)["row"][:]
    return concatenate_datasets(list(sets)).select(order), [bisect_right(starts, row) - 1 for row in order]
