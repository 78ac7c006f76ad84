"""Every measured number in a table of the documentation comes from a row in docs/benchmarks.

Tables between marks are made by `benchmarks.tables`, which must make them again as they stand. A table elsewhere that
holds numbers like measured ones is either checked against a file of rows number by number, or named here with the
reason why it is no measurement.
"""

import json
import re
from collections.abc import Iterator

import pytest

from benchmarks.tables import MARKED, ROOT, TABLES, filled, pages

PAGES = pages()
MEASURED = re.compile(r"\d\.\d|\d ?%|\d ?(?:MiB|GiB|ms|s)\b")
# (page, first heading of the table) -> its rows: written by hand, each number is checked.
BY_HAND = {
    ("README.md", "adapter"): "layer_multiples_cpu.json",
}
# Measured, with rows beside them, and not checked against these yet.
UNCHECKED = {
    ("speed_up.md", "model"): "whole_model_cpu.json: ratios of its rows",
    ("scale.md", ""): "memory_arithmetic.json",
    ("train.md", "data"): "real_data.json: largest differences over its steps",
    ("serving.md", "kind"): "what scripts/servers.py found",
    ("combine.md", "asked for"): "combine beside add_weighted_adapter",
}
# (page, first headings) -> why its numbers are none of ours.
NOT_MEASURED = {
    ("combine.md", "`--method`"): "numbers of papers",
    ("composition.md", "option"): "options",
    ("composition.md", "call"): "options",
    ("galore.md", ""): "memory that the run prints, computed from shapes",
    ("intruders.md", "option"): "options",
    ("intruders.md", "case"): "what tests/intruders/test_against_peft.py runs",
    ("lora.md", "option"): "options",
    ("optimizers.md", "option"): "options, generated",
    ("report.md", "key"): "a file format",
    ("serving.md", "the adapter has"): "adapter/serving.yaml, of the servers' own loaders",
    ("serving.md", "kind"): "made by scripts/servers.py, which runs the servers' own loaders",
    ("train.md", "task"): "examples of rows",
    ("weightlora.md", "reference"): "what the reference code does",
}


def tables(text: str) -> Iterator[list[str]]:
    """The tables of a page outside of the marks, line by line."""
    outside = MARKED.sub("", text)
    for block in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        yield block.splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def by_hand() -> Iterator[tuple[str, list[str]]]:
    """(page, table) of the tables that may hold measured numbers."""
    for page in PAGES:
        for lines in tables(page.read_text(encoding="utf-8")):
            body = [re.sub(r"`[^`]*`", "", cell) for line in lines[2:] for cell in cells(line)]
            if any(MEASURED.search(cell) for cell in body):
                yield page.name, lines


def test_marked_tables_are_what_the_rows_make_them():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert filled(text) == text, f"{page.name} differs from its rows: python -m benchmarks.tables"


def test_every_mark_is_closed_and_known():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"<!-- table: (.*?) -->", text)
        assert names == [match[1] for match in MARKED.findall(text)] == [name for name in names if name in TABLES]
        assert text.count("<!-- end of table -->") == len(names)


@pytest.mark.slow
def test_a_changed_number_is_noticed():
    page = next(page for page in PAGES if MARKED.search(page.read_text(encoding="utf-8")))
    text = page.read_text(encoding="utf-8")
    block = MARKED.search(text)[0]
    changed = text.replace(block, re.sub(r"(\d\.\d*)(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10), block, count=1))
    assert changed != text
    assert filled(changed) == text


def test_no_other_table_holds_measured_numbers():
    unknown = {(page, cells(lines[0])[0]) for page, lines in by_hand()} - {*BY_HAND, *NOT_MEASURED, *UNCHECKED}
    assert not unknown, f"put these tables between marks, and make them in benchmarks/tables: {unknown}"


@pytest.mark.parametrize(("where", "file"), BY_HAND.items(), ids=lambda value: value[0])
def test_each_number_written_by_hand_is_a_row(where, file):
    values = list(numbers(json.loads((ROOT / "docs" / "benchmarks" / file).read_text(encoding="utf-8"))))
    (lines,) = [lines for page, lines in by_hand() if (page, cells(lines[0])[0]) == where]
    for cell in (cell for line in lines[2:] for cell in cells(line)[1:]):
        for number in re.findall(r"\d+\.\d+", cell):
            digits = len(number.partition(".")[2])
            assert any(f"{value:.{digits}f}" == number for value in values), f"{number} is no number of {file}"


def numbers(content) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from numbers(value)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content
