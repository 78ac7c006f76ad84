"""The files of a report: all there, whole, and with a hint where a library is missing."""

import dataclasses
import json
import subprocess
import sys

import pytest
from PIL import Image

from loraloom.report import Bars, Report, Section, write_report
from loraloom.text import slug

from .support import full_report, heatmap


def test_files_and_what_is_filled_in(tmp_path):
    written = write_report(full_report(), tmp_path / "a" / "report")
    folder = tmp_path / "a" / "report"
    figures = sum(section.figure is not None for section in full_report().sections)
    assert written.missing == ""
    assert (written.data, written.page) == (folder / "report.json", folder / "report.html")
    assert len(written.pictures) == figures
    assert sorted(folder.iterdir()) == sorted([written.data, written.page, *written.pictures])
    content = json.loads(written.data.read_text(), parse_constant=pytest.fail)
    assert content["schema_version"] == 1
    assert content["sections"] == json.loads(json.dumps([dataclasses.asdict(s) for s in full_report().sections]))
    assert content["versions"]["loraloom"]
    assert content["created"].startswith("20")
    for path in written.pictures:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 100
            assert len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 5  # something is drawn


def test_writing_again_replaces_all_of_it(tmp_path):
    write_report(Report("t", "c", sections=full_report().sections[:2]), tmp_path)
    (tmp_path / "mine.png").write_text("left alone")
    written = write_report(Report("t", "c", sections=[Section("One", figure=heatmap(2))]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "figure-01-one.png",
        "mine.png",
        "report.html",
        "report.json",
    ]
    assert written.pictures == [tmp_path / "figure-01-one.png"]


def test_what_cannot_be_json_leaves_the_old_report(tmp_path):
    write_report(Report("old", "c"), tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(Report("new", "c", sections=[Section("s", figure=Bars("b", ["a"], [float("nan")]))]), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["title"] == "old"


@pytest.mark.parametrize(
    ("blocked", "left", "message"),
    [
        (["resvg_py"], ["report.html", "report.json"], "the pictures for model cards need resvg-py: pip install"),
        (["jinja2", "resvg_py"], ["report.json"], "the page needs jinja2: pip install 'loraloom[report]'; the pict"),
    ],
)
def test_without_the_extra_the_rest_is_written(tmp_path, blocked, left, message):
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from loraloom.report import Bars, Report, Section, write_report
report = Report("t", "c", sections=[Section("s", figure=Bars("b", ["a"], [1.0]))])
print(write_report(report, {str(tmp_path)!r}).missing)
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_report_needs_no_torch():
    program = (
        "import sys, loraloom.report.builders, loraloom.report.png, loraloom.report.html; print('torch' in sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.stdout == "False\n", outcome.stderr


def test_titles_as_file_names():
    assert slug("Loss & metrics (‖ΔW‖)") == "loss-metrics-w"
    assert slug("‖Δ‖") == "figure"
