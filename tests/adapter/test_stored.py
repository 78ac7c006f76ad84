"""Adapters read from disk have the update that PEFT computes with them."""

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig
from loraloom.adapter import base as base_module
from loraloom.adapter.base import as_matrix, as_weight, base_key, stored_transposed
from loraloom.adapter.open import open_adapter
from loraloom.errors import InputError
from loraloom.io.checkpoint import open_checkpoint
from tests.models import gpt2
from tests.refusals import coded

LINEAR = ["q_proj", "down_proj", "embed_tokens"]
CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR),
    "rslora with patterns": peft.LoraConfig(
        r=4,
        lora_alpha=5,
        use_rslora=True,
        target_modules=LINEAR,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 7},
    ),
    "everything of ours": LoomConfig(
        r=4, lora_alpha=6, target_modules=LINEAR, use_mixer="orthogonal", use_gate=True, rank_pattern={"q_proj": 2}
    ),
    "anchored": LoomConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", use_gate=True),
}


def saved(model, config, folder):
    """A saved adapter with random tensors, and the PEFT model it came from."""
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "loom_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_update_is_the_one_that_peft_computes(pico_llama_dir, tmp_path, config):
    model = saved(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config, tmp_path)
    stored = open_adapter(tmp_path)
    base = open_checkpoint(pico_llama_dir)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(stored.modules) == set(layers)
    for name, layer in layers.items():
        module = stored.modules[name]
        delta = module.update().delta()
        assert tuple(delta.shape) == module.shape
        shape = base.shape(base_key(name, base))
        transposed = stored_transposed(name, delta.shape, shape, {}, stored.config)
        torch.testing.assert_close(as_weight(delta, shape, transposed), layer.get_delta_weight("default"))
        assert torch.equal(as_matrix(as_weight(delta, shape, transposed), transposed), delta)
        assert module.rank == layer.r["default"]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", [peft.LoraConfig, LoomConfig])
def test_convolutions_and_magnitudes(tmp_path, make, use_dora):
    net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(5, 4))
    config = make(r=2, lora_alpha=3, target_modules=["0", "2"], use_dora=use_dora)
    model = saved(net, config, tmp_path)
    stored = open_adapter(tmp_path)
    for name in ("0", "2"):
        layer, weight = model.base_model.model.get_submodule(name), net.get_submodule(name).weight
        delta = stored.modules[name].update().delta()
        transposed = stored_transposed(name, delta.shape, weight.shape, {}, stored.config)
        if use_dora:
            W = as_matrix(weight.detach(), transposed) + delta
            adapted = (stored.modules[name].magnitude() / W.norm(dim=1))[:, None] * W
            model.merge_adapter()
            torch.testing.assert_close(as_weight(adapted, weight.shape, transposed), weight.detach())
            model.unmerge_adapter()
        else:
            torch.testing.assert_close(as_weight(delta, weight.shape, transposed), layer.get_delta_weight("default"))
            assert stored.modules[name].magnitude() is None


# PEFT takes the bias of lora_B for a factor that was not gathered.
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
def test_lora_bias_and_other_tensors(pico_llama_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    for layer in base.model.layers:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    config = peft.LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = saved(base, config, tmp_path)
    stored = open_adapter(tmp_path)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    torch.testing.assert_close(
        stored.modules["model.layers.1.self_attn.q_proj"].bias(), 3 * layer.lora_B["default"].bias.detach()
    )
    assert stored.others == ["base_model.model.lm_head.weight"]
    assert len(stored.sha256) == 64


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("make", [peft.LoraConfig, LoomConfig])
def test_square_conv1d_is_known_for_what_it_is(tmp_path, make, fan_in_fan_out):
    config = make(r=2, target_modules=["c_proj"], fan_in_fan_out=True)
    model = saved(gpt2(), config, tmp_path)
    stored = open_adapter(tmp_path)
    stored.config["fan_in_fan_out"] = fan_in_fan_out  # PEFT leaves what the last layer set
    layer = model.base_model.model.transformer.h[0].attn.c_proj
    name = "transformer.h.0.attn.c_proj"
    delta = stored.modules[name].update().delta()
    assert stored_transposed(name, delta.shape, (16, 16), {"model_type": "gpt2"}, stored.config)
    torch.testing.assert_close(delta.T, layer.get_delta_weight("default"))


def test_every_model_with_conv1d_is_known():
    import pathlib
    import re

    import transformers

    names = set()
    for file in (pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text()
        if re.search(r"import .*\bConv1D\b", text) and "= Conv1D(" in text:
            names |= set(re.findall(r"self\.(\w+) = Conv1D\(", text))
            configuration = "".join(f.read_text() for f in file.parent.glob("configuration_*.py"))
            types = set(re.findall(r'model_type = "([^"]+)"', configuration))
            assert types & base_module.CONV1D_MODELS, f"{file.name} uses Conv1D"
    assert names
    assert names <= base_module.CONV1D_NAMES


def test_a_base_saved_with_or_without_its_prefix(tmp_path):
    save_file({"layers.0.q.weight": torch.zeros(1), "norm.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    bare = open_checkpoint(tmp_path)
    assert base_key("layers.0.q", bare) == base_key("model.layers.0.q", bare) == "layers.0.q.weight"
    assert base_key("layers.1.q", bare) is None
    full = tmp_path / "full"
    full.mkdir()
    save_file(
        {"a.q.weight": torch.zeros(1), "b.q.weight": torch.zeros(1), "a.k.weight": torch.zeros(1)},
        full / "model.safetensors",
    )
    prefixed = open_checkpoint(full)
    assert base_key("k", prefixed) == "a.k.weight"
    assert base_key("q", prefixed) is None  # two weights could be meant


def test_an_adapter_of_another_base_is_an_error():
    with pytest.raises(InputError, check=coded("other-base")):
        stored_transposed("q", (4, 3), (5, 3), {}, {})


def refused(folder, code):
    with pytest.raises(InputError) as error:
        open_adapter(folder)
    assert error.value.code == code, error.value
    assert "\n" not in str(error.value)


def broken(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_what_cannot_be_read_is_one_line(pico_llama_dir, tmp_path):
    whole = tmp_path / "whole"
    saved(AutoModelForCausalLM.from_pretrained(pico_llama_dir), peft.LoraConfig(target_modules=["q_proj"]), whole)

    def copy(name):
        return shutil.copytree(whole, tmp_path / name)

    other = copy("other")
    broken(other, peft_type="IA3")
    refused(other, "peft-type")
    parameters = copy("parameters")
    broken(parameters, target_parameters=["experts.gate"])
    refused(parameters, "experts")
    pickled = copy("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "pickle")
    empty = copy("empty")
    (empty / "adapter_model.safetensors").unlink()
    refused(empty, "no-weights")
    (empty / "adapter_config.json").unlink()
    refused(empty, "no-config")
    shutil.copytree(whole, empty / "squad")
    with pytest.raises(InputError, check=coded("no-config", "adapter_config.json")):
        open_adapter(empty)
    half = copy("half")
    tensors = load_file(half / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lora_B" not in k}, half / "adapter_model.safetensors")
    refused(half, "missing-tensor")


def test_reading_imports_neither_peft_nor_transformers():
    code = "import sys, loraloom.adapter.open; print([m for m in ('peft', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
