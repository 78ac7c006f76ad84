"""Bases that bitsandbytes quantised are read as what they stand for, and merged into that."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraloom import LoomConfig
from loraloom.errors import InputError
from loraloom.io.checkpoint import open_checkpoint
from loraloom.io.quantized import bitsandbytes as quantised_module
from loraloom.io.quantized.checkpoint import QuantizedCheckpoint
from loraloom.merge import edits
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import logits, trained
from tests.models import llama
from tests.refusals import coded

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}

TOLERANCE = {"nf4": 0.11, "fp4": 0.15, "int8": 0.01}


@pytest.fixture(params=FORMATS)
def quantised(request, tmp_path):
    """The folder of a quantised model, and how it is quantised."""
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "original")
    config = BitsAndBytesConfig(**FORMATS[request.param])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base", request.param


def test_weights_are_near_those_that_were_quantised(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_module, "_CHUNK", 130)
    folder, kind = quantised
    original = open_checkpoint(tmp_path / "original")
    base = QuantizedCheckpoint(folder, list(open_checkpoint(folder).files), {})
    assert set(base) == set(original)
    for key in base:
        W, exact = base.rows(key, 0, base.shape(key)[0]), original.tensor(key)
        assert base.shape(key) == exact.shape == W.shape
        assert base.dtype(key) is torch.bfloat16
        is_linear = key.endswith("proj.weight")
        assert torch.equal(W, exact) != is_linear
        # What rounding to the nearest of 16 values leaves of a normal distribution is 0.09 with NF4.
        assert (W - exact).float().norm() <= (TOLERANCE[kind] if is_linear else 0) * exact.float().norm()
        assert torch.equal(base.rows(key, 1, 3), W[1:3])


def test_merging_into_a_dequantised_base(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(edits, "BLOCK", 300)
    folder, _ = quantised
    config = LoomConfig.dora(r=2, target_modules=["q_proj", "down_proj"])
    trained(llama().to(torch.bfloat16), config, tmp_path / "adapter")
    with pytest.raises(InputError, check=coded("quantized", "--base-precision")):
        merge_checkpoint([tmp_path / "adapter"], folder, tmp_path / "out")
    options = {"base_precision": "dequantised"}
    result = merge_checkpoint([tmp_path / "adapter"], folder, tmp_path / "out", **options)
    merge_checkpoint([tmp_path / "adapter"], folder, tmp_path / "exact", dtype="float32", **options)
    merged = open_checkpoint(tmp_path / "out")
    assert {merged.dtype(key) for key in merged} == {torch.bfloat16}
    assert not [key for key in merged if "quant" in key or "SCB" in key]
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in saved
    assert saved["dtype"] == "bfloat16"
    assert any("no longer quantised" in note for note in result.notes)
    assert result.shards == len(open_checkpoint(folder).files)

    # The same from a checkpoint of the dequantised weights.
    base = QuantizedCheckpoint(folder, list(open_checkpoint(folder).files), {})
    plain = llama()
    plain.load_state_dict({key: base.rows(key, 0, base.shape(key)[0]).float() for key in base})
    plain.save_pretrained(tmp_path / "plain")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "plain", tmp_path / "expected")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "expected"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exact")), expected)
