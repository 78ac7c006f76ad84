"""`loraloom export`: a folder that is written, refused or failed, and the exit code of each."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig
from loraloom.cli.main import main


@pytest.fixture
def adapter(pico_llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    model = peft.get_peft_model(model, LoomConfig.moslora(r=4, target_modules=["q_proj", "o_proj"]))
    for layer in model.base_model.model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.loom_lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_vllm_adapter(adapter, tmp_path, capsys):
    assert main(["export", str(adapter), "--to", "vllm", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "a plain LoRA for vllm, 2 modules, rank 8, float32" in out
    assert "Exact up to rounding" in out
    assert "Left out, because their update is zero: 2 modules" in out
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


def test_json_and_a_lossy_export(adapter, tmp_path, capsys):
    command = ["export", str(adapter), "--rank", "2", "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 2
    assert "--allow-lossy" in capsys.readouterr().err
    assert main([*command, "--allow-lossy"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lossy"]
    assert report["error"] > 0.01
    assert report["rank"] == 2


def test_wrong_input(adapter, tmp_path, capsys):
    assert main(["export", str(adapter)]) == 2
    assert main(["export", str(adapter / "no"), "--out", str(tmp_path / "out")]) == 2
    assert main(["export", str(adapter), "--out", str(adapter)]) == 2
    assert capsys.readouterr().err.count("\n") == 3
