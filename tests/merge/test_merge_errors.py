"""What cannot be merged is one line that names it, and leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig
from loraloom.errors import InputError, RunFailedError
from loraloom.io.checkpoint import open_checkpoint
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import trained

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def adapter(pico_llama_dir, tmp_path):
    config = LoomConfig(r=2, target_modules=["q_proj", "v_proj"])
    trained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config, tmp_path / "adapter")
    return tmp_path / "adapter"


def edited(folder, change):
    """The adapter with its tensors changed."""
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")


def configured(folder, **changes):
    """The adapter, or the model, with its configuration changed."""
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(match, adapters, base, out, error=InputError, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        merge_checkpoint(adapters, base, out, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_every_tensor_without_a_place_is_named(pico_llama_dir, adapter, tmp_path):
    def lost(tensors):
        prefix = "base_model.model."
        moved = {k.replace("layers.1.self_attn.q_proj", "layers.9.self_attn.q_proj"): v for k, v in tensors.items()}
        return moved | {f"{prefix}extra.weight": torch.zeros(2), f"{prefix}model.norm.secret": torch.zeros(2)}

    edited(adapter, lost)
    names = [r"extra\.weight", r"model\.norm\.secret", r"layers\.9\.self_attn\.q_proj"]
    refused(f"3 of its tensors.*{'.*'.join(names)}", [adapter], pico_llama_dir, tmp_path / "out")


def test_adapters_of_another_kind_or_base(pico_llama_dir, adapter, tmp_path):
    out = tmp_path / "out"
    other = shutil.copytree(pico_llama_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {key: tensors[key][:5]}, other / "model.safetensors")
    refused("update is 32 x 32, the base weight 5x32", [adapter], other, out)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts"]}, "have no place"),
    ],
)
def test_peft_adapters_whose_update_is_not_in_the_file(pico_llama_dir, tmp_path, changes, match):
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    trained(model, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    configured(tmp_path / "adapter", **changes)
    refused(match, [tmp_path / "adapter"], pico_llama_dir, tmp_path / "out")


def test_an_adapter_with_infinity(pico_llama_dir, adapter, tmp_path):
    def broken(tensors):
        next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("inf")
        return tensors

    edited(adapter, broken)
    refused(
        r"q_proj of .*adapter: B holds NaN or inf",
        [adapter],
        pico_llama_dir,
        tmp_path / "out",
    )


def test_a_weight_too_large_for_its_dtype(pico_llama_dir, adapter, tmp_path):
    edited(adapter, lambda tensors: {k: v * 1e7 if "lora_B" in k else v for k, v in tensors.items()})
    refused("cannot hold: .*bfloat16", [adapter], pico_llama_dir, tmp_path / "out", RunFailedError, dtype="float16")


def test_folders_that_must_not_be_written(pico_llama_dir, adapter, tmp_path):
    base = shutil.copytree(pico_llama_dir, tmp_path / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    refused("is or holds .*base, which is read", [adapter], base, base, overwrite=True)
    refused("is or holds .*adapter, which is read", [adapter], base, adapter, overwrite=True)
    refused("is or holds", [adapter], base, tmp_path, overwrite=True)
    refused("full is not empty: .*--overwrite", [adapter], base, tmp_path / "full")
    refused("x is a file", [adapter], base, tmp_path / "full" / "x", overwrite=True)


def test_a_full_disk(pico_llama_dir, adapter, tmp_path, monkeypatch):
    size = sum(open_checkpoint(pico_llama_dir).nbytes(key) for key in open_checkpoint(pico_llama_dir))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size))  # the tokenizer is too much
    refused("the merged model needs .* GB and .* GB left", [adapter], pico_llama_dir, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * size))
    merge_checkpoint([adapter], pico_llama_dir, tmp_path / "deep" / "out")


def test_numbers_of_adapters_and_weights(pico_llama_dir, adapter, tmp_path):
    out = tmp_path / "out"
    refused("no adapter given", [], pico_llama_dir, out)
    refused("2 weights for 1 adapters", [adapter], pico_llama_dir, out, weights=[1, 2])
    refused("'float8'; expected one of float32", [adapter], pico_llama_dir, out, dtype="float8")


def test_what_cannot_be_weighted(pico_llama_dir, tmp_path):
    config = LoomConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    trained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config, tmp_path / "adapter")
    base = shutil.copytree(pico_llama_dir, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    refused(r"brings a new tensor model\.norm\.weight", [tmp_path / "adapter"], base, tmp_path / "out", weights=[0.5])


def test_quantised_bases_of_other_kinds(pico_llama_dir, adapter, tmp_path):
    base = shutil.copytree(pico_llama_dir, tmp_path / "base")
    refused("is not quantised", [adapter], base, tmp_path / "out", base_precision="dequantised")
    refused("'other'; expected original or", [adapter], base, tmp_path / "out", base_precision="other")
    configured(base, quantization_config={"quant_method": "awq"})
    refused(r"quantised by awq, in a format that is not read", [adapter], base, tmp_path / "out")


def test_tied_heads_of_unknown_name(pico_bert_dir, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    base = BertForMaskedLM(BertConfig.from_pretrained(pico_bert_dir))
    base.save_pretrained(tmp_path / "base")
    config = LoomConfig(r=2, target_modules=["word_embeddings"])
    trained(base, config, tmp_path / "adapter")
    refused("also uses as its output head", [tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")


def test_merging_imports_neither_peft_nor_transformers(pico_llama_dir, adapter, tmp_path):
    code = (
        "import sys; from loraloom.merge.merge import merge_checkpoint;"
        "merge_checkpoint(sys.argv[1:2], *sys.argv[2:]);"
        "print([name for name in ('peft', 'transformers', 'bitsandbytes') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, adapter, pico_llama_dir, tmp_path / "out"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
