"""Data: the built-in set is stable, splits depend on the rows alone, and a row that does not fit is named."""

import dataclasses
import json

import datasets
import pytest

from loraloom.training.config import DataSection
from loraloom.training.data import load_data
from loraloom.training.sources import read_file
from loraloom.training.stdlib_docstrings import stdlib_docstrings

from .support import assert_error

ROWS = [{"text": f"text number {i}", "label": ["no", "yes"][i % 2]} for i in range(200)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def unvalidated(path, **keys):
    """A section without a validation set."""
    return DataSection(path=path, validation_fraction=0, **keys)


def texts(data):
    return set(data.train["text"]), set(data.test["text"])


def test_files_of_every_kind_give_the_same_rows(tmp_path, rows):
    table = datasets.Dataset.from_list(ROWS)
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    expected = load_data(DataSection(path=rows), "text-classification")
    for name in ("rows.csv", "rows.parquet"):
        data = load_data(DataSection(path=str(tmp_path / name)), "text-classification")
        assert data.train[:] == expected.train[:]
        assert data.test[:] == expected.test[:]
        assert data.label_names == expected.label_names == ["no", "yes"]


def test_labels_become_ids_in_the_order_of_their_names(rows):
    data = load_data(DataSection(path=rows), "text-classification")
    label_of = {row["text"]: row["label"] for row in ROWS}
    for row in [*data.train, *data.test]:
        assert data.label_names[row["label"]] == label_of[row["text"]]


def test_integer_labels_are_ordered_as_numbers(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": f"text {i}", "label": [2, 10, 1][i % 3]} for i in range(60)])
    data = load_data(DataSection(path=path), "text-classification")
    assert data.label_names == ["1", "2", "10"]
    assert data.train[0] == {"text": "text 0", "label": 1}


def test_split_is_stable_when_rows_are_added(tmp_path, rows):
    train, test = texts(load_data(unvalidated(rows, test_fraction=0.3), "text-classification"))
    assert train.isdisjoint(test)
    assert 0.2 < len(test) / len(ROWS) < 0.4
    more = write(tmp_path / "more.jsonl", [{"text": f"another {i}", "label": "no"} for i in range(50)] + ROWS[::-1])
    more_train, more_test = texts(load_data(unvalidated(more, test_fraction=0.3), "text-classification"))
    assert train <= more_train
    assert test <= more_test


def test_equal_rows_are_on_one_side(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS * 3)
    train, test = texts(load_data(DataSection(path=path, test_fraction=0.5), "text-classification"))
    assert train.isdisjoint(test)


def test_chats_are_split_too(tmp_path):
    chat = [{"messages": [{"role": "user", "content": f"question {i}"}], "extra": i} for i in range(100)]
    data = load_data(unvalidated(write(tmp_path / "chat.jsonl", chat), test_fraction=0.3), "causal-lm")
    assert data.train.column_names == data.test.column_names == ["messages"]
    assert len(data.train) + len(data.test) == 100
    assert 15 < len(data.test) < 45


def test_subsample_is_stable_and_in_order(rows):
    few = load_data(DataSection(path=rows, max_train=20, max_test=5), "text-classification")
    fewer = load_data(DataSection(path=rows, max_train=10, max_test=5), "text-classification")
    assert (len(few.train), len(fewer.train), len(few.test)) == (20, 10, 5)
    assert set(fewer.train["text"]) < set(few.train["text"])
    numbers = [int(text.split()[-1]) for text in few.train["text"]]
    assert numbers == sorted(numbers)


def test_a_test_file_is_taken_as_it_is(tmp_path, rows):
    test = write(tmp_path / "test.jsonl", [{"text": "text number 1", "label": "yes"}])
    data = load_data(unvalidated(rows, test_path=test), "text-classification")
    assert (len(data.train), data.test[:]) == (200, {"text": ["text number 1"], "label": [1]})


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"test": 30}, {"train": 100, "test": 30}),
        ({"validation": 20}, {"train": 100, "test": 20}),
        ({"validation": 20, "test": 30}, {"train": 100, "validation": 20, "test": 30}),
        ({"validation": 20, "test": -30}, {"train": 100, "test": 20}),  # a test set whose labels are hidden
    ],
)
def test_a_folder_with_splits_of_its_own(tmp_path, splits, sizes):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for name, size in {"train": 100, **splits}.items():
        rows = {"text": [f"{name} {i}" for i in range(abs(size))]}
        rows["label"] = [i % 2 if size > 0 else -1 for i in range(abs(size))]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    data = load_data(unvalidated(str(tmp_path)), "text-classification")
    assert {name: len(rows) for name, rows in data.parts.items()} == sizes


def test_the_validation_set_is_a_stable_share_of_the_training_rows(tmp_path, rows):
    test = write(tmp_path / "test.jsonl", ROWS[:10])
    section = DataSection(path=rows, test_path=test, validation_fraction=0.25)
    data = load_data(section, "text-classification")
    train, validation = set(data.train["text"]), set(data.validation["text"])
    assert train.isdisjoint(validation)
    assert train | validation == {row["text"] for row in ROWS}
    assert 0.15 < len(validation) / len(ROWS) < 0.35
    file = write(tmp_path / "validation.jsonl", ROWS[10:20])
    data = load_data(dataclasses.replace(section, validation_path=file), "text-classification")
    assert (len(data.train), data.validation["text"][:]) == (200, [row["text"] for row in ROWS[10:20]])


def test_class_labels_keep_their_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    table = datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    data = load_data(unvalidated(str(tmp_path / "rows.parquet"), test_fraction=0.5), "text-classification")
    assert data.label_names == ["yes", "no"]


def test_the_only_string_column_is_the_text(tmp_path):
    rows = [{"sentence": row["text"], "label": row["label"], "number": 1} for row in ROWS]
    data = load_data(DataSection(path=write(tmp_path / "rows.jsonl", rows)), "text-classification")
    assert data.train.column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "text": "c"}, ["prompt", "completion"]),
        ({"text": "a", "label": 1}, ["text"]),
        ({"messages": [{"role": "user", "content": "a"}], "text": "c"}, ["messages"]),
    ],
)
def test_causal_columns(tmp_path, row, expected):
    path = write(tmp_path / "rows.jsonl", [row] * 3)
    data = load_data(DataSection(path=path, test_path=path), "causal-lm")
    assert sorted(data.train.column_names) == sorted(expected)


def test_causal_text_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"body": "a", "text": "c"}] * 3)
    data = load_data(DataSection(path=path, test_path=path, text_column="text"), "causal-lm")
    assert data.train[:] == {"text": ["c"] * 3}


@pytest.mark.parametrize(
    ("rows", "keys", "code", "named"),
    [
        ([{"body": "a", "title": "b", "label": 1}], {}, "two-text-columns", "data.text_pair_column"),
        ([{"body": "a", "title": "b", "by": "c", "label": 1}], {}, "no-column", "set data.text_column"),
        ([{"text": "a", "topic": 1}], {}, "no-column", "among text, topic; set data.label_column"),
        ([{"text": "a", "label": 1}], {"label_column": "topic"}, "no-column", "'topic'"),
        ([{"text": "a", "label": 1}], {"text_column": "body"}, "no-column", "'body'"),
        ([{"text": f"a{i}", "label": "same"} for i in range(99)], {}, "one-label", "'same'"),
        ([{"text": "a", "label": 1}, {"text": "", "label": 2}], {}, "no-text", "row 2 of the train set has ''"),
        ([{"text": None, "label": 1}, {"text": "b", "label": 2}], {}, "no-text", "row 1 of the train set has None"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], {}, "unknown-label", "row 2 of the train set"),
        ([{"text": "a", "label": 1.5}], {}, "wrong-labels", "float64"),
        ([{"text": "a", "label": [1]}], {}, "wrong-labels", "lists"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], {}, "wrong-labels", "int and str"),
        ([{"text": "a", "label": 1}], {}, "empty-set", "data.test_path"),
        ([], {}, "unreadable", ".jsonl"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, rows, keys, code, named):
    section = DataSection(path=write(tmp_path / "rows.jsonl", rows), **keys)
    assert_error(code, named, lambda: load_data(section, "text-classification"))


def test_label_that_only_test_has(tmp_path, rows):
    test = write(tmp_path / "test.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "Yes"}])
    section = DataSection(path=rows, test_path=test)
    named = "row 2 of the test set has label 'Yes'; the training labels are no, yes; did you mean 'yes'?"
    assert_error("unknown-label", named, lambda: load_data(section, "text-classification"))


def test_causal_without_a_known_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"body": "a"}] * 3)
    assert_error("no-column", "body", lambda: load_data(DataSection(path=path), "causal-lm"))


@pytest.mark.parametrize(
    ("path", "code"),
    [("row.jsonl", "no-file"), ("rows.pdf", "no-data"), ("nobody/nothing", "no-data")],
)
def test_data_that_is_not_there(tmp_path, rows, path, code):
    where = path if path.startswith("nobody") else str(tmp_path / path)
    assert_error(code, path, lambda: load_data(DataSection(path=where), "text-classification"))


def test_broken_json_says_so(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": \n')
    section = DataSection(path=str(tmp_path / "rows.jsonl"))
    assert_error("unreadable", ".jsonl (", lambda: load_data(section, "text-classification"))


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_tables_are_separated_by_what_their_header_says(tmp_path, name, separator):
    lines = [separator.join(("text", "label"))] + [separator.join((f"text {i}", "no")) for i in range(5)]
    (tmp_path / name).write_text("\n".join(lines))
    assert read_file(tmp_path / name, "data.path")[:] == {"text": [f"text {i}" for i in range(5)], "label": ["no"] * 5}


def test_a_text_file_has_a_text_on_each_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    section = unvalidated(str(tmp_path / "a.txt"), test_path=str(tmp_path / "a.txt"))
    assert load_data(section, "causal-lm").train[:] == {"text": ["one", "two"]}


def test_columns_that_are_not_read_are_known(tmp_path):
    rows = [{"premise": f"a {i}", "hypothesis": "b", "label": i % 2, "id": i} for i in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    alone = load_data(DataSection(path=path, text_column="premise"), "text-classification")
    assert alone.ignored == ("hypothesis", "id")
    section = DataSection(path=path, text_column="premise", text_pair_column="hypothesis")
    pairs = load_data(section, "text-classification")
    assert pairs.ignored == ("id",)
    assert pairs.train[0] == {"text": "a 0", "text_pair": "b", "label": 0}


@pytest.fixture
def library(tmp_path):
    """A small library: fourteen packages, p00 with 30 docstrings down to p13 with 17; and what must not be read."""
    for i in range(14):
        package = tmp_path / f"p{i:02}"
        package.mkdir()
        for j in range(30 - i):
            (package / f"m{j}.py").write_text(f'def f():\n    """Does {i} and\n    {j}.\n\n    More.\n    """\n')
    (tmp_path / "p00" / "shared.py").write_text('"""Said by two packages."""')
    (tmp_path / "p01" / "shared.py").write_text('"""Said by two packages."""')
    (tmp_path / "p02" / "again.py").write_text('"""Does 2 and 0."""')
    (tmp_path / "p03" / "broken.py").write_text("def (")
    for name in ("site-packages/other", "p00/tests", "idlelib"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "a.py").write_text('"""Not to be read."""')
    (tmp_path / "p04" / "a.py").write_text('class A:\n    """An A."""\n    async def f(self):\n        """An f."""\n')
    return tmp_path


def test_docstrings_of_a_library(library):
    texts, labels, in_test = stdlib_docstrings(library)
    assert set(labels) == {f"p{i:02}" for i in range(12)}
    assert len(set(texts)) == len(texts) == len(labels) == len(in_test)
    label_of = dict(zip(texts, labels, strict=True))
    assert label_of["Does 7 and 3."] == "p07"
    assert label_of["An A."] == label_of["An f."] == "p04"
    assert "Said by two packages." not in label_of
    assert "Not to be read." not in label_of
    assert labels.count("p02") == 28
    assert 0.1 < sum(in_test) / len(in_test) < 0.3


def test_a_text_keeps_its_side_in_another_library(library):
    texts, _, in_test = stdlib_docstrings(library)
    before = dict(zip(texts, in_test, strict=True))
    for j in range(40):
        (library / "p13" / f"n{j}.py").write_text(f'"""New text {j}."""')
    stdlib_docstrings.cache_clear()
    texts, labels, in_test = stdlib_docstrings(library)
    assert "p13" in labels
    assert "p11" not in labels
    after = dict(zip(texts, in_test, strict=True))
    assert all(after[text] == side for text, side in before.items() if text in after)


def test_built_in_data_set():
    data = load_data(DataSection(max_train=None), "text-classification")
    assert len(data.label_names) == 12
    assert len(data.train) > 1000
    assert len(data.test) > 200
    train, test = texts(data)
    assert train.isdisjoint(test)
    assert {"asyncio", "email", "tkinter"} <= set(data.label_names)
