"""The benchmark of experts runs, and its contenders compute the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_tiny_run(tmp_path):
    arguments = ["--tiny", "--rounds", "1", "--out", str(tmp_path / "rows.json")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.experts", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2
    assert all(row["difference"] < 1e-5 for row in rows)
    assert all(row["cpu_seconds"] > 0 and row["peak_bytes"] > row["saved_bytes"] > 0 for row in rows)
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (theirs["by"], ours["by"]) == ("PEFT", "loraloom")
        assert ours["flops"] < theirs["flops"]
