"""`loraloom inspect`: what it prints, and with which exit code it ends."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraloom.cli.main import main


@pytest.fixture
def adapter(pico_llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    for layer in model.base_model.model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_the_page_has_everything(adapter, pico_llama_dir, capsys):
    assert main(["inspect", str(adapter), "--base", str(pico_llama_dir), "--layers", "3"]) == 0
    out = capsys.readouterr().out
    assert "LoRA (type LORA)" in out
    assert "warning: 2 of 4 updates are zero" in out
    assert "3 of 4 layers" in out
    assert out.count("B is zero") == 2  # the broken ones come first
    for server in ("PEFT", "vLLM", "llama.cpp"):
        assert f"{server}: ok" in out
    assert "SGLang: rejected" in out  # it stacks q, k and v, and the adapter has q alone


def test_all_layers(adapter, capsys):
    assert main(["inspect", str(adapter), "--layers", "all"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 layers" in out


def test_json_is_alone_on_stdout(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["layers"]) == 4
    assert values["findings"][0]["code"] == "zero"


def test_exit_codes(adapter, pico_bert_dir, tmp_path, capsys):
    assert main(["inspect", str(adapter), "--base", str(pico_bert_dir), "--quiet"]) == 1
    assert "are not in the base model" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert main(["inspect"]) == 2
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert main(["inspect", str(adapter)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].count("cannot be read as safetensors") == 1
