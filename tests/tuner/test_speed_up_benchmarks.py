"""The benchmarks of speed_up run, and count more than nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu", "whole_model"])
def test_a_tiny_run_has_a_row_for_every_contender(name, tmp_path):
    arguments = ["--tiny", "--out", str(tmp_path / "rows.json"), *(["--rounds", "1"] if name == "whole_model" else [])]
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) % 3 == 0
    assert {row["by"] for row in rows} == {"PEFT", "sped up", "loraloom"}
    assert all(row["launches"] > 0 and row["ms"] > 0 for row in rows)
