"""DDP and FSDP2 on two processes give what one process gives on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.composition import distributed_worker as worker
from tests.composition.support import save_members

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory in which two processes have left what they trained, a file for each mode."""
    directory = tmp_path_factory.mktemp("two_processes")
    save_members(directory)
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


@pytest.mark.parametrize("mode", ["ddp", "ddp, one v", "fsdp2"])
def test_two_processes_equal_one(mode, trained):
    model = worker.build(trained, mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    worker.train(model)
    state = load_file(trained / f"{mode}.safetensors")
    assert state.keys() == before.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-3, atol=1e-4)
        if not parameter.requires_grad:
            assert torch.equal(state[name], before[name])
    moved = [name for name in state if not torch.equal(state[name], before[name])]
    assert len(moved) == (5 if mode == "ddp, one v" else 4)  # the embedding has one member, of weight 1
    if mode == "ddp, one v":
        copies = [state[name] for name, p in model.named_parameters() if p.requires_grad]
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def test_one_v_sharded_is_an_error(trained):
    message = (trained / "fsdp2, one v.txt").read_text()
    assert "scope='layer', or DDP" in message
