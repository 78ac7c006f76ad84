"""A merge that is killed leaves no half model, and the next one gives the right result."""

import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig
from loraloom.io.checkpoint import open_checkpoint
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import same_logits, trained

# Stops after each tensor until it is told to go on.
STEPPING = """
import sys
from loraloom.merge.merge import merge_checkpoint

def progress(description, done, total):
    print(done, flush=True)
    sys.stdin.readline()

merge_checkpoint(sys.argv[1:2], *sys.argv[2:4], overwrite=True, progress=progress)
"""


@pytest.mark.parametrize(("tensors", "overwriting"), [(9, False), (21, True)])
def test_killed_in_the_middle(pico_llama_dir, tmp_path, tensors, overwriting):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(pico_llama_dir).save_pretrained(base, max_shard_size="20KB")
    config = LoomConfig.dora(r=2, target_modules="all-linear")
    model = trained(AutoModelForCausalLM.from_pretrained(base), config, adapter)
    if overwriting:
        out.mkdir()
        (out / "old").write_text("old")
    command = [sys.executable, "-c", STEPPING, adapter, base, out]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for i in range(tensors):
            assert process.stdout.readline() == f"{i + 1}\n"
            if i + 1 < tensors:
                process.stdin.write("\n")
                process.stdin.flush()
        process.kill()
    left = tmp_path / ".out.unfinished"
    shards = len(open_checkpoint(base).files)
    assert 0 < len(list(left.glob("*.safetensors"))) <= shards
    assert [path.name for path in out.glob("*")] == (["old"] if overwriting else [])
    merge_checkpoint([adapter], base, out, overwrite=overwriting)
    same_logits(out, model)
    assert not (out / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
