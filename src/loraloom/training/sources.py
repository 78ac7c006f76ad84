"""Where rows come from: local files, hub data sets, folders of images, and the built-in set."""

import csv
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import DataSection
from loraloom.training.stdlib_docstrings import as_questions, stdlib_docstrings

BUILT_IN = ("stdlib-docstrings", "stdlib-questions")
READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".tsv": Dataset.from_csv,
    ".txt": Dataset.from_text,
    ".parquet": Dataset.from_parquet,
}
TABLES = (".csv", ".tsv")


def read_parts(section: DataSection, images: bool = False) -> dict[str, Dataset]:
    """The rows as they are stored: `train`, and `validation` and `test` where the source has them.

    Args:
        section: `data` of RUN.yaml.
        images: read a local folder as a folder of images for each label.

    Raises:
        InputError: a file or data set that is not there or cannot be read.
    """
    parts = _read_path(section, images)
    for name, path in (("validation", section.validation_path), ("test", section.test_path)):
        if path:
            parts[name] = read_file(Path(path), f"data.{name}_path")
    return parts


def _read_path(section: DataSection, images: bool) -> dict[str, Dataset]:
    path = Path(section.path)
    if section.path in BUILT_IN:
        texts, labels, in_test = stdlib_docstrings()
        columns = {"text": texts, "label": labels} if section.path == BUILT_IN[0] else as_questions(texts, labels)
        rows = Dataset.from_dict(columns)
        return {
            "train": rows.select([i for i, chosen in enumerate(in_test) if not chosen]),
            "test": rows.select([i for i, chosen in enumerate(in_test) if chosen]),
        }
    if path.suffix in READERS:
        return {"train": read_file(path, "data.path")}
    try:
        if images and path.is_dir():
            loaded = datasets.load_dataset("imagefolder", data_dir=section.path)
        else:
            loaded = datasets.load_dataset(section.path, section.subset)
    except Exception as error:  # the hub, the network, a folder without data: each has errors of its own
        raise InputError(
            f"data.path {section.path!r}: not {' or '.join(BUILT_IN)}, not a file ending in {', '.join(READERS)}, and "
            f"no data set that can be loaded ({type(error).__name__}: {_one_line(error)})",
            code="no-data",
        ) from error
    if not isinstance(loaded, DatasetDict) or "train" not in loaded:
        raise InputError(
            f"data.path {section.path!r}: has no split 'train' but {', '.join(map(str, loaded))}", code="no-data"
        )
    # Some have several, such as MNLI's `validation_matched`: the first one.
    found = {part: [name for name in loaded if str(name).startswith(part)] for part in ("train", "validation", "test")}
    return {part: loaded[part if part in names else names[0]] for part, names in found.items() if names}


def read_file(path: Path, key: str) -> Dataset:
    """The rows of a local file; `.txt` has one text a line, `.csv` may be separated by commas, semicolons or tabs.

    Raises:
        InputError: no such file, another ending, or not what the ending says.
    """
    if path.suffix not in READERS:
        raise InputError(
            f"{key} {str(path)!r}: expected a file ending in {', '.join(READERS)}", code="unknown-file-type"
        )
    if not path.is_file():
        near = [str(path.with_name(p.name)) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise InputError(f"{key} {str(path)!r}: no such file{did_you_mean(str(path), near)}", code="no-file")
    options: dict[str, Any] = {"sep": _separator(path)} if path.suffix in TABLES else {}
    try:
        return READERS[path.suffix](str(path), **options)
    except Exception as error:
        raise InputError(
            f"{key} {str(path)!r}: cannot be read as {path.suffix} ({_one_line(error)})", code="unreadable"
        ) from error


def _separator(path: Path) -> str:
    """What separates the columns: a tab in .tsv, else the separator that the header has most of."""
    if path.suffix == ".tsv":
        return "\t"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        header = file.readline()
    found = {sep: len(next(csv.reader([header], delimiter=sep), [])) for sep in (",", ";", "\t")}
    return max(found, key=lambda sep: found[sep])  # ties go to the comma, which is first


def _one_line(error: BaseException) -> str:
    """The innermost cause's message, on one line: datasets wraps the parser's own words twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
