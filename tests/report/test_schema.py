"""report.json is the report: a round trip changes nothing, and what is not a report is refused in one line."""

import copy
import json

import pytest

from loraloom.errors import InputError
from loraloom.report import Bars, Heatmap, Lines, Report, Section, Series, Table, from_dict, load_report, to_dict

from .support import full_report, heatmap


def test_round_trip_through_json():
    report = full_report()
    assert from_dict(json.loads(json.dumps(to_dict(report), allow_nan=False))) == report


def test_the_smallest_report_has_defaults():
    assert from_dict({"schema_version": 1, "title": "t", "command": "c"}) == Report("t", "c")


def broken(path, value):
    """The full report's dict with one place changed."""
    content = copy.deepcopy(to_dict(full_report()))
    *way, last = path
    target = content
    for step in way:
        target = target[step]
    target[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"holds a list; expected an object"),
        (broken(["schema_version"], 99), r"schema_version is 99, this loraloom reads 1"),
        (broken(["titel"], "x"), r"report\.json: unknown key 'titel'; did you mean 'title'\?"),
        ({"schema_version": 1, "title": "t"}, r"key 'command' is missing"),
        (broken(["title"], 3), r"report\.json\.title: 3 is not a string"),
        (broken(["summary", 0, "value"], None), r"summary\[0\]\.value: None is not a string"),
        (
            broken(["sections", 0, "figure", "kind"], "pie"),
            r"sections\[0\]\.figure: kind is 'pie'; expected one of lines,",
        ),
        (
            broken(["sections", 0, "figure", "series", 0, "y", 2], "high"),
            r"series\[0\]\.y\[2\]: 'high' is not a number",
        ),
        (broken(["sections", 0, "figure", "log_y"], 1), r"log_y: 1 is not true or false"),
        (broken(["sections", 0, "figure", "series"], {}), r"figure\.series: {} is not a list"),
        (broken(["summary", 0], "fact"), r"summary\[0\]: 'fact' is not an object"),
        (broken(["sections", 0, "figure", "series", 0, "x"], [1]), r"'train' has 1 x and 400 y"),
        (
            broken(["sections", 2, "figure", "rows"], ["0"]),
            r"values have 32 rows of \[7\] values; expected 1",
        ),
        (broken(["sections", 9, "table", "rows", 0], [1]), r"a row has 1 cells and the table 5 columns"),
        (broken(["sections", 9, "table", "rows", 0, 0], True), r"rows\[0\]\[0\]: True is not a string or"),
    ],
)
def test_what_is_not_a_report_is_one_line(content, message):
    with pytest.raises(InputError, match=message) as caught:
        from_dict(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ('{"title": NaN}', "NaN is not JSON")])
def test_a_file_that_is_not_json(tmp_path, text, message):
    path = tmp_path / "report.json"
    with pytest.raises(InputError, match="no such file"):
        load_report(path)
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_report(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_nan(number):
    report = Report("t", "c", sections=[Section("s", figure=Bars("b", ["a"], [number]))])
    with pytest.raises(ValueError, match=r"report\.sections\[0\]\.figure\.values\[0\] is (nan|inf)"):
        to_dict(report)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Series("s", [1.0], []), "1 x and 0 y"),
        (lambda: Lines("x", "y", [Series("s", [1.0], [0.0])], log_y=True), "0 on a logarithmic axis; set log_y"),
        (lambda: Lines("x", "y", [Series("s", [-1.0], [1.0])], log_x=True), "-1 on a logarithmic axis; set log_x"),
        (lambda: Heatmap("r", "c", ["a"], ["b"], [[1.0, 2.0]]), r"1 rows of \[2\] values"),
        (lambda: Bars("b", ["a"], [1.0], []), "1 labels, 1 values and 0 errors"),
        (lambda: Table(["a"], [["x", "y"]]), "a row has 2 cells"),
    ],
)
def test_figures_that_contradict_themselves_cannot_be_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_heatmap_may_be_empty():
    assert heatmap(1).values
    assert Heatmap("r", "c", [], ["b"], []).values == []
