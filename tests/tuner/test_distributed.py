"""DDP and FSDP2 on two processes give what one process gives on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tuner import distributed_worker as worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory in which two processes have left what they trained, a file for each mode."""
    directory = tmp_path_factory.mktemp("two_processes")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", worker.__name__, str(rank), str(directory)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(worker.WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return directory


@pytest.mark.parametrize("mode", worker.MODES)
def test_two_processes_equal_one(mode, trained):
    model = worker.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    worker.train(model)
    state = load_file(trained / f"{mode}.safetensors")
    assert state.keys() == before.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(state[name], before[name]) != parameter.requires_grad
