"""Rows to train on: the built-in set, local files or a hub data set, brought to the columns that a task needs.

text-classification gets `text` (str) and `label` (id); causal-lm gets `messages`, or `prompt` and `completion`, or
`text`, which TRL's SFTTrainer reads. What does not fit is an InputError that names the columns found.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from loraloom.errors import InputError, did_you_mean
from loraloom.training.config import DataSection, Task
from loraloom.training.stdlib_docstrings import stdlib_docstrings, text_hash

BUILT_IN = "stdlib-docstrings"
READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}
TEXT_TYPES = ("string", "large_string")
# In TRL's order of preference: a chat carries most, a bare text least.
CAUSAL_COLUMNS = (("messages",), ("prompt", "completion"), ("text",))


@dataclass(frozen=True)
class RunData:
    """Train and test rows, and the labels' names in the order of their ids (empty for causal-lm)."""

    train: Dataset
    test: Dataset
    label_names: list[str]


def load_data(section: DataSection, task: Task) -> RunData:
    """Read the rows that `section` names and bring them to the columns of `task`.

    Train and test are the data set's own splits, or two files, or `path` divided by a hash of each row: a row keeps
    its side when others are added, and equal rows are never on both.

    Raises:
        InputError: a file or data set that cannot be read, a missing column, no rows, a text or label that is missing
            or of the wrong kind, a single label, or a label in test that train does not have.
    """
    train, test = _read(section)
    if task == "text-classification":
        text, label = _classification_columns(section, train)
        names = _label_names(train, label)
        train, test = (
            part if part is None else _with_label_ids(part, name, text, label, names)
            for part, name in ((train, "train"), (test, "test"))
        )
    else:
        names = []
        train = _causal_rows(section, train)
        test = test if test is None else _causal_rows(section, test)
    if test is None:
        cut = round(section.test_fraction * 10_000)
        in_test = [row_hash(row) % 10_000 < cut for row in train]
        test = train.select([i for i, chosen in enumerate(in_test) if chosen])
        train = train.select([i for i, chosen in enumerate(in_test) if not chosen])
    train, test = _subsample(train, section.max_train), _subsample(test, section.max_test)
    for part, name in ((train, "train"), (test, "test")):
        if not len(part):
            raise InputError(f"data.path {section.path!r}: the {name} set is empty; give more rows or data.test_path")
    if task == "text-classification" and len(set(train["label"])) < 2:
        only = names[train["label"][0]]
        raise InputError(f"data.path {section.path!r}: every training row has label {only!r}; expected two or more")
    return RunData(train, test, names)


def row_hash(row: dict[str, Any]) -> int:
    """A number that depends on the row's content alone."""
    return text_hash(row["text"] if "text" in row else json.dumps(row, sort_keys=True, default=str))


def data_sha256(data: RunData) -> str:
    """A hash of every row that is trained or tested on, in order, and of the labels' names."""
    digest = hashlib.sha256(json.dumps(data.label_names).encode())
    for rows in (data.train, data.test):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _read(section: DataSection) -> tuple[Dataset, Dataset | None]:
    """The rows as they are stored: train, and test if the source has one of its own."""
    test = _read_file(Path(section.test_path), "data.test_path") if section.test_path else None
    path = Path(section.path)
    if section.path == BUILT_IN:
        texts, labels, in_test = stdlib_docstrings()
        rows = Dataset.from_dict({"text": texts, "label": labels})
        if test is None:
            test = rows.select([i for i, chosen in enumerate(in_test) if chosen])
        return rows.select([i for i, chosen in enumerate(in_test) if not chosen]), test
    if path.suffix in READERS:
        return _read_file(path, "data.path"), test
    try:
        loaded = datasets.load_dataset(section.path, section.subset)
    except Exception as error:  # the hub, the network, a folder without data: each has errors of its own
        raise InputError(
            f"data.path {section.path!r}: not {BUILT_IN!r}, not a file ending in {', '.join(READERS)}, and no data set "
            f"that can be loaded ({type(error).__name__}: {_one_line(error)})"
        ) from error
    if not isinstance(loaded, DatasetDict) or "train" not in loaded:
        raise InputError(f"data.path {section.path!r}: has no split 'train' but {', '.join(map(str, loaded))}")
    if test is None:  # validation first: the labels of many public test sets are hidden
        test = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    return loaded["train"], test


def _read_file(path: Path, key: str) -> Dataset:
    if path.suffix not in READERS:
        raise InputError(f"{key} {str(path)!r}: expected a file ending in {', '.join(READERS)}")
    if not path.is_file():
        near = [str(path.with_name(p.name)) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise InputError(f"{key} {str(path)!r}: no such file{did_you_mean(str(path), near)}")
    try:
        return READERS[path.suffix](str(path))
    except Exception as error:
        raise InputError(f"{key} {str(path)!r}: cannot be read as {path.suffix} ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    """The innermost cause's message, on one line: datasets wraps the parser's own words twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _classification_columns(section: DataSection, rows: Dataset) -> tuple[str, str]:
    """Names of the text column and the label column."""
    found = rows.column_names
    label = section.label_column or next((name for name in ("label", "labels") if name in found), None)
    if label is None or label not in found:
        raise _no_column(section, label or "label", found, "data.label_column")
    text = section.text_column or ("text" if "text" in found else None)
    if text is None:
        strings = [c for c, feature in rows.features.items() if _holds(feature, TEXT_TYPES) and c != label]
        text = strings[0] if len(strings) == 1 else None
    if text is None or text not in found:
        raise _no_column(section, text or "text", found, "data.text_column")
    return text, label


def _holds(feature: Any, types: tuple[str, ...]) -> bool:
    """Whether a column holds plain values of one of these types; a list or a record is none."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(types)


def _no_column(section: DataSection, column: str, found: list[str], key: str) -> InputError:
    return InputError(f"data.path {section.path!r}: no column {column!r} among {', '.join(found)}; set {key}")


def _label_names(train: Dataset, column: str) -> list[str]:
    """Names in the order of their ids: the data set's own where it has them, else the sorted labels of train."""
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if not _holds(feature, (*TEXT_TYPES, "int", "uint", "bool")):
        kind = getattr(feature, "dtype", "nested values")
        raise InputError(f"column {column!r} holds {kind}; expected integer or string labels")
    return [str(value) for value in sorted(set(train[column]) - {None})]


def _with_label_ids(rows: Dataset, part: str, text: str, label: str, names: list[str]) -> Dataset:
    """Columns `text` and `label`, the label as an id; every row is checked."""
    for column in (text, label):
        if column not in rows.column_names:
            raise InputError(f"the {part} set has no column {column!r} among {', '.join(rows.column_names)}")
    texts, labels = rows[text], rows[label]
    ids = {name: i for i, name in enumerate(names)}
    if isinstance(rows.features[label], datasets.ClassLabel):
        known: dict[Any, int] = {i: ids[name] for i, name in enumerate(rows.features[label].names) if name in ids}
    else:
        known = {value: ids[str(value)] for value in set(labels) if str(value) in ids}
    for i, (value, name) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"row {i} of the {part} set has {value!r} in column {text!r}; expected a text")
        if name not in known:
            raise InputError(
                f"row {i} of the {part} set has label {name!r}; the training labels are {', '.join(names)}"
            )
    return Dataset.from_dict({"text": texts, "label": [known[name] for name in labels]})


def _causal_rows(section: DataSection, rows: Dataset) -> Dataset:
    """The columns that SFTTrainer reads, and no others: a stray one would change how it understands the rows."""
    if section.text_column:
        if section.text_column not in rows.column_names:
            raise _no_column(section, section.text_column, rows.column_names, "data.text_column")
        rows = rows.select_columns([section.text_column])
        return rows if section.text_column == "text" else rows.rename_column(section.text_column, "text")
    for columns in CAUSAL_COLUMNS:
        if set(columns) <= set(rows.column_names):
            return rows.select_columns(list(columns))
    raise InputError(
        f"data.path {section.path!r}: has columns {', '.join(rows.column_names)}; expected messages, or prompt and "
        "completion, or text; set data.text_column"
    )


def _subsample(rows: Dataset, limit: int | None) -> Dataset:
    """The `limit` rows with the smallest hashes, in their old order."""
    if limit is None or limit >= len(rows):
        return rows
    hashes = [row_hash(row) for row in rows]
    return rows.select(sorted(sorted(range(len(rows)), key=hashes.__getitem__)[:limit]))
