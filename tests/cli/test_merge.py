"""`loraloom merge` as a user calls it."""

import json
import subprocess
import sys

import peft
import pytest
from transformers import AutoModelForCausalLM

from loraloom.cli.main import main
from tests.adapter.support import trained


@pytest.fixture
def adapter(pico_llama_dir, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    trained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_merge_and_verify(pico_llama_dir, adapter, tmp_path):
    command = ["merge", adapter, "--base", pico_llama_dir, "--out", tmp_path / "out", "--verify", "2", "--json"]
    outcome = subprocess.run(
        [sys.executable, "-m", "loraloom.cli.main", *map(str, command)], capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result == json.loads((tmp_path / "out" / "merge.json").read_text())
    assert result["verification"]["prompts"] == 2
    assert result["verification"]["max_logit_difference"] < 1e-5
    assert len(result["modules"]) == 2
    assert "Verified on 2 prompts (text)" in outcome.stderr


def test_weights_may_be_negative_and_quiet_is_quiet(pico_llama_dir, adapter, tmp_path, capsys):
    words = ["merge", adapter, adapter, "--base", pico_llama_dir, "--out", tmp_path / "out", "--weights", "0.5", "-0.5"]
    assert main([*map(str, words), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    result = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert result["weights"] == [0.5, -0.5]
    assert set(result["modules"].values()) == {0}
    assert result["notes"] == ["The merged model is the base: every update of the adapter is zero."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1", "2"], "2 weights for 1 adapters; expected one for each"),
        (["--base-precision", "dequantised"], "is not quantised"),
        (["--precision", "original"], "did you mean '--base_precision'"),
    ],
)
def test_errors_are_one_line(pico_llama_dir, adapter, tmp_path, capsys, options, message):
    words = ["merge", adapter, "--base", pico_llama_dir, "--out", tmp_path / "out", *options]
    assert main(list(map(str, words))) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--base", "--out", None])
def test_what_is_needed(capsys, missing):
    words = {"--base": ["--base", "b"], "--out": ["--out", "o"], None: []}
    given = [word for option, pair in words.items() if option != missing for word in pair]
    assert main(["merge", *(["a"] if missing else []), *given]) == 2
    assert "merge needs an adapter, --base MODEL and --out FOLDER" in capsys.readouterr().err
