"""`loraloom compare`: real runs in processes of their own, and what the verb says."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from loraloom.cli.main import main


@pytest.fixture
def compare_yaml(pico_bert_dir, tmp_path):
    """LoRA and MoSLoRA, one seed, one rate, 4 steps each."""
    rows = [{"text": f"{c} {w}", "label": c} for c in ("red", "blue") for w in ("dog", "cat", "apple", "file")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "COMPARE.yaml"
    content = {
        "model": {"name": str(pico_bert_dir)},
        "data": {"path": str(tmp_path / "rows.jsonl"), "test_path": str(tmp_path / "rows.jsonl")},
        "method": {"r": 4},
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 8, "use_cpu": True},
        "output": {"dir": str(tmp_path / "out")},
        "compare": {"methods": ["lora", "moslora"], "seeds": [0], "learning_rates": [1e-2]},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_two_methods_in_processes_of_their_own(compare_yaml, tmp_path, capsys):
    """Both at a time; then again, when there is nothing left to do."""
    assert main(["compare", str(compare_yaml), "--jobs", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result
    lora, moslora = result["methods"]
    assert moslora["trainable_parameters"] > lora["trainable_parameters"] > 0
    for run in result["runs"]:
        assert run["error"] is None
        assert (run["result"]["method"], run["result"]["steps"]) == (run["label"], 4)
        # A process that trains holds PyTorch; two that shared a process would report the same peak.
        assert run["result"]["peak_memory_bytes"] > 100 * 2**20
        assert json.loads((tmp_path / run["folder"] / "metrics.json").read_text()) == run["result"]
        assert not list((tmp_path / run["folder"]).glob("checkpoints/*"))
    assert "[2/2]" in err
    assert "minus lora" in err
    started = time.monotonic()
    assert main(["compare", str(compare_yaml), "--json", "--quiet"]) == 0
    assert time.monotonic() - started < 5
    out, err = capsys.readouterr()
    assert json.loads(out)["methods"] == result["methods"]
    assert err == ""


def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(compare_yaml, tmp_path):
    """A real SIGINT to the comparison alone, once its first run has begun to write."""
    arguments = ["compare", str(compare_yaml), "--training.num_train_epochs", "100000"]
    command = [sys.executable, "-m", "loraloom.cli.main", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "runs").glob("*/resolved.yaml")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err == f"loraloom: stopped with 0 of 2 runs finished; go on with: loraloom {' '.join(arguments)}\n"
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    size = (folder / "log.txt").stat().st_size
    time.sleep(0.5)
    assert (folder / "log.txt").stat().st_size == size
    assert not list(folder.glob("metrics.json"))


def test_a_failed_run_names_its_log(compare_yaml, capsys):
    """Wrong input that only the process finds; the other run is not started for the same reason, as it differs."""
    options = ["--compare.methods", "{lora: {method: {target_modules: [kwery]}}}"]
    assert main(["compare", str(compare_yaml), *options]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"lora, learning rate 0\.01, seed 0: failed: .*kwery.*; see .*log\.txt \(\d+ s\)", out)
    assert err.startswith("loraloom: none of 1 runs finished; the first one: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "compare needs a COMPARE.yaml"),
        (["none.yaml"], "none.yaml: no such file"),
        (["none.yaml", "--job", "2"], "unknown option '--job'; did you mean '--jobs'?"),
        (["none.yaml", "--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["none.yaml", "--compare.seeds"], "--compare.seeds has no value"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(capsys, arguments, expected):
    assert main(["compare", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err


def test_nothing_heavy_is_imported_by_the_comparison_itself():
    program = (
        "import sys; from loraloom.training.compare import compare; import loraloom.cli.compare;"
        "print(sorted({'torch', 'transformers', 'optuna', 'numpy'} & sys.modules.keys()))"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.stdout == "[]\n", outcome.stderr
