"""`--nproc`: mistakes are said once, and a run whose process was killed ends, and resumes to the same weights."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.processes import command_on_ranks

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
COMMAND = [sys.executable, "-m", "loraloom.cli.main", "train"]


@pytest.fixture
def run_yaml(pico_bert_dir, tmp_path):
    rows = [{"text": f"{c} {w}", "label": c} for c in ("red", "blue") for w in ("dog", "cat", "apple", "file") * 8]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model": {"name": str(pico_bert_dir)},
        "data": {"path": str(data), "test_path": str(data), "validation_fraction": 0},
        "method": {"name": "moslora", "r": 4, "lora_dropout": 0.1},
        "training": {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "max_steps": 24},
        "output": {"dir": str(tmp_path / "run")},
    }
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def loraloom(*words):
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT, timeout=280)


@pytest.mark.slow
def test_a_mistake_in_two_processes_is_one_line_and_code_2(run_yaml):
    outcome = loraloom(run_yaml, "--nproc", 2, "--method.target_modules", "[nothing]")
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.count("loraloom: ") == 1


def test_nproc_within_torchrun_is_refused(run_yaml):
    words = [*COMMAND, str(run_yaml), "--nproc", "2"]
    outcome = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT | {"WORLD_SIZE": "2"})
    assert outcome.returncode == 2
    assert "torchrun" in outcome.stderr


def test_a_killed_process_ends_the_run_and_it_resumes(run_yaml, tmp_path):
    """kill -9 of one of two processes; what is resumed on two has the weights of the uninterrupted run on two."""
    command_on_ranks("train", run_yaml, "--quiet", "--output.dir", tmp_path / "whole")
    process = subprocess.Popen([*COMMAND, str(run_yaml), "--nproc", "2", "--quiet"], env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("checkpoints/*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    victim = next(child for child in children if child.environ()["RANK"] == "1")
    victim.kill()
    assert process.wait(timeout=90) == 1
    assert not (tmp_path / "run" / "metrics.json").exists()
    command_on_ranks("train", run_yaml, "--quiet", "--resume")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
