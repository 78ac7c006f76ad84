"""The library tells what it does and draws nothing; the command line draws."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from loraloom.cli import options
from loraloom.progress import tracked


def test_an_item_is_done_when_the_next_is_asked_for():
    told = []
    for item in tracked("ab", "Reading", lambda *what: told.append(what)):
        told.append(item)
    assert told == [("Reading", 0, 2), "a", ("Reading", 1, 2), "b", ("Reading", 2, 2)]


@pytest.mark.parametrize(
    ("seconds", "terminal", "drawn"), [(0.0, True, True), (60.0, True, False), (0.0, False, False)]
)
def test_short_work_and_no_terminal_show_no_bar(monkeypatch, seconds, terminal, drawn):
    monkeypatch.setattr(options, "QUIET_SECONDS", seconds - 1e-9)
    file = io.StringIO()
    with options.progress_on(Console(file=file, force_terminal=terminal, width=100)) as progress:
        for _ in tracked(range(3), "Folding", progress):
            pass
    assert ("Folding" in file.getvalue()) == drawn


@pytest.mark.slow
def test_the_verbs_work_where_nothing_is_drawn():
    program = "import sys; sys.modules['rich.progress'] = None; sys.modules['rich.live'] = None; import " + ", ".join(
        ["loraloom.intruders.live", "loraloom.intruders.stored", "loraloom.export.export", "loraloom.merge.merge"]
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
