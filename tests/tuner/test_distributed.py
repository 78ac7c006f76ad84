"""DDP and FSDP2 on two processes give what one process gives on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tuner import distributed_worker as worker

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_equal_one(mode, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", worker.__name__, mode, str(rank), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(worker.WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)

    model = worker.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    worker.train(model)
    trained = load_file(tmp_path / "trained.safetensors")
    assert trained.keys() == before.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(trained[name], before[name]) != parameter.requires_grad
