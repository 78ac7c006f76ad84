"""A merged model computes what the base with its adapters computes in PEFT, and nothing is lost on the way."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2Model,
)

from loraloom import LoomConfig
from loraloom.errors import InputError
from loraloom.io.checkpoint import open_checkpoint
from loraloom.merge import edits
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import logits, same_logits, trained
from tests.models import gpt2, llama
from tests.refusals import coded

# PEFT tells what it saves, and that it does not tie what it trains: both are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model (with|has) `?tie")
LINEAR = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "rslora with patterns": peft.LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=LINEAR,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 7},
    ),
    "embedding and head": peft.LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"]),
    "dora of peft": peft.LoraConfig(r=3, target_modules=[*LINEAR, "embed_tokens"], use_dora=True),
    "saved modules and tokens": peft.LoraConfig(
        r=3, target_modules=LINEAR, modules_to_save=["lm_head", "norm"], trainable_token_indices=[3, 5]
    ),
    "everything of ours": LoomConfig(
        r=4,
        target_modules=[*LINEAR, "embed_tokens"],
        use_mixer="orthogonal",
        use_gate=True,
        use_dora=True,
        rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"],
    ),
    "ours with tokens": LoomConfig(r=4, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [0, 7]}),
    "anchored": LoomConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa", use_gate=True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every matrix of the pico models is merged in several blocks."""
    monkeypatch.setattr(edits, "BLOCK", 300)


@pytest.fixture
def sharded(pico_llama_dir, tmp_path):
    """The pico model in shards, with its tokenizer and files of all kinds."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(pico_llama_dir).save_pretrained(base, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(pico_llama_dir).save_pretrained(base)
    (base / "pytorch_model.bin").write_bytes(b"before the merge")
    (base / "README.md").write_text("a model")
    (base / ".cache").mkdir()
    (base / ".cache" / "x.json").write_text("{}")
    (base / "parts").mkdir()
    (base / "parts" / "settings.json").write_text("{}")
    return base


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_unmerged_model(sharded, tmp_path, config):
    model = trained(AutoModelForCausalLM.from_pretrained(sharded), config, tmp_path / "adapter")
    result = merge_checkpoint([tmp_path / "adapter"], sharded, tmp_path / "out")
    same_logits(tmp_path / "out", model)
    with model.disable_adapter():
        assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))).abs().max() > 1e-2
    assert result.modules
    assert not result.added
    assert result.rounding < 1e-6


def test_layout_and_files_are_kept(sharded, tmp_path):
    trained(AutoModelForCausalLM.from_pretrained(sharded), CONFIGS["lora"], tmp_path / "adapter")
    result = merge_checkpoint([tmp_path / "adapter"], sharded, tmp_path / "out")
    out, left = tmp_path / "out", {"pytorch_model.bin", ".cache", "x.json"}
    names = {str(path.relative_to(sharded)) for path in sharded.rglob("*") if path.name not in left}
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == names | {"merge.json"}
    for path in sharded.iterdir():
        if path.suffix == ".safetensors":
            before, after = open_checkpoint(path), open_checkpoint(out / path.name)
            assert before.keys() == after.keys()
            assert before.metadata(path) == after.metadata(out / path.name)
        elif path.name == "README.md":
            assert "a model" not in (out / path.name).read_text()  # the merged model has a card of its own
        elif path.is_file() and path.name not in left:
            assert json_or_bytes(path) == json_or_bytes(out / path.name)
    assert json.loads((out / "merge.json").read_text()) == result.to_dict()
    assert result.bytes == sum(t.nbytes for f in out.glob("*.safetensors") for t in load_file(f).values())
    assert result.shards > 2
    base = open_checkpoint(sharded)
    for name, relative in result.modules.items():
        W, merged = base.tensor(f"{name}.weight"), open_checkpoint(out).tensor(f"{name}.weight")
        assert relative == pytest.approx(((merged - W).norm() / W.norm()).item(), rel=1e-5)


def json_or_bytes(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def test_every_tensor_that_no_adapter_changes_keeps_its_bytes(sharded, tmp_path):
    trained(AutoModelForCausalLM.from_pretrained(sharded), CONFIGS["anchored"], tmp_path / "adapter")
    result = merge_checkpoint([tmp_path / "adapter"], sharded, tmp_path / "out")
    before, after = open_checkpoint(sharded), open_checkpoint(tmp_path / "out")
    changed = [key for key in before if not torch.equal(before.tensor(key), after.tensor(key))]
    assert {key.removesuffix(".weight") for key in changed} == set(result.modules)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_saved_biases(tmp_path, bias):
    base = llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    model = trained(base, peft.LoraConfig(r=2, target_modules=["q_proj"], bias=bias), tmp_path / "adapter")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    same_logits(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT takes the bias of lora_B for an ungathered factor
def test_lora_bias(tmp_path):
    base = llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], lora_bias=True)
    model = trained(base, config, tmp_path / "adapter")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    same_logits(tmp_path / "out", model)
    llama().save_pretrained(tmp_path / "no_bias")
    with pytest.raises(InputError, check=coded("unresolved", "self_attn.q_proj")):
        merge_checkpoint([tmp_path / "adapter"], tmp_path / "no_bias", tmp_path / "out2")


TIED = {
    "linear layers": (dict(target_modules=LINEAR), True),
    "the embedding": (dict(target_modules=["embed_tokens"]), False),
    "the head": (dict(target_modules=["lm_head"]), False),
    "both": (dict(target_modules=["embed_tokens", "lm_head"]), False),
    "both, tied": (dict(target_modules=["embed_tokens"], ensure_weight_tying=True), True),
    "a saved embedding": (dict(target_modules=LINEAR, modules_to_save=["embed_tokens"]), False),
    "a saved head": (dict(target_modules=LINEAR, modules_to_save=["lm_head"]), False),
    "a saved embedding, tied": (
        dict(target_modules=LINEAR, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
    ),
    "tokens": (dict(target_modules=LINEAR, trainable_token_indices=[2, 9]), True),
    "tokens and the head": (dict(target_modules=["lm_head"], trainable_token_indices=[2, 9]), False),
}


@pytest.mark.parametrize(("options", "stays_tied"), TIED.values(), ids=TIED)
def test_tied_weights(tmp_path, options, stays_tied):
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = trained(base, peft.LoraConfig(r=2, **options), tmp_path / "adapter")
    result = merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    merged = same_logits(tmp_path / "out", model)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == stays_tied
    assert ("lm_head.weight" in open_checkpoint(tmp_path / "out")) != stays_tied
    assert result.added == [] if stays_tied else result.added == ["lm_head.weight"]
    assert any("has its own" in note for note in result.notes) != stays_tied


@pytest.mark.parametrize("target", ["c_proj", "wte"])
@pytest.mark.parametrize("make", [peft.LoraConfig, LoomConfig])
def test_conv1d_and_a_base_without_its_prefix(tmp_path, target, make):
    base = gpt2()
    base.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]  # as openai-community/gpt2 is
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "wte.weight" in open_checkpoint(tmp_path / "base")
    model = trained(base, make(r=2, target_modules=[target], fan_in_fan_out=True, use_dora=True), tmp_path / "adapter")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    same_logits(tmp_path / "out", model)
    assert GPT2Model.from_pretrained(tmp_path / "out").wte.weight.shape == (50, 16)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_classifier_on_a_bare_encoder(pico_bert_dir, tmp_path, labels):
    model = BertForSequenceClassification.from_pretrained(pico_bert_dir, num_labels=labels)
    model = trained(
        model, LoomConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"), tmp_path / "adapter"
    )
    result = merge_checkpoint([tmp_path / "adapter"], pico_bert_dir, tmp_path / "out")
    assert result.added == ["classifier.bias", "classifier.weight"]
    merged = same_logits(tmp_path / "out", model, AutoModelForSequenceClassification)
    assert type(merged).__name__ == "BertForSequenceClassification" == merged.config.architectures[0]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pico_bert_dir / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary(tmp_path, tied):
    base = llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(63, mean_resizing=False)
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=2, target_modules=LINEAR, modules_to_save=saved, ensure_weight_tying=tied)
    model = trained(base, config, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "tokenizer.json").write_text("[]")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    merged = same_logits(tmp_path / "out", model, ids=torch.tensor([[61, 62, 3]]))
    assert merged.config.vocab_size == 63
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", [peft.LoraConfig, LoomConfig])
def test_convolutions_and_models_without_a_configuration(tmp_path, make, use_dora):
    net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Conv1d(4, 6, 3), nn.Linear(5, 4))
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    model = trained(net, make(r=2, target_modules=["0", "1", "2"], use_dora=use_dora), tmp_path / "adapter")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor)


def test_several_adapters_and_their_weights(sharded, tmp_path):
    names, weights = ["a", "b", "c"], [1.0, 0.5, -0.25]
    for name, make in zip(names, (LoomConfig.dora, LoomConfig.moslora, LoomConfig.dora), strict=True):
        trained(AutoModelForCausalLM.from_pretrained(sharded), make(r=2, target_modules=LINEAR), tmp_path / name)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharded), tmp_path / "a", "a")
    for name in names[1:]:
        model.load_adapter(tmp_path / name, name)
    model.base_model.set_adapter(names)
    paths = [tmp_path / name for name in names]
    merge_checkpoint(paths, sharded, tmp_path / "sum")
    same_logits(tmp_path / "sum", model)

    result = merge_checkpoint(paths, sharded, tmp_path / "weighted", weights=weights)
    assert result.weights == weights
    base, merged = open_checkpoint(sharded), open_checkpoint(tmp_path / "weighted")
    alone = []
    for path in paths:
        merge_checkpoint([path], sharded, tmp_path / f"{path.name}_alone")
        alone.append(open_checkpoint(tmp_path / f"{path.name}_alone"))
    for key in base:
        W = base.tensor(key)
        expected = W + sum(w * (one.tensor(key) - W) for w, one in zip(weights, alone, strict=True))
        torch.testing.assert_close(merged.tensor(key), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_rounded_to_once(pico_llama_dir, tmp_path, dtype):
    base = AutoModelForCausalLM.from_pretrained(pico_llama_dir, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules="all-linear")
    trained(base.float(), config, tmp_path / "adapter")
    exact = merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "exact", dtype="float32")
    result = merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out", dtype=dtype)
    before, exactly, merged = (open_checkpoint(tmp_path / name) for name in ("base", "exact", "out"))
    lost = update = 0.0
    for key in merged:
        full, rounded = exactly.tensor(key), merged.tensor(key)
        assert torch.equal(full.to(rounded.dtype), rounded)
        assert rounded.dtype is getattr(torch, dtype)
        if key.removesuffix(".weight") in result.modules:
            lost += (rounded.float() - full).square().sum().item()
            update += (full - before.tensor(key).float()).square().sum().item()
    assert exact.rounding == 0
    assert result.rounding == pytest.approx((lost / update) ** 0.5, rel=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is getattr(torch, dtype)


def test_without_dtype_each_weight_keeps_its_own(pico_llama_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(pico_llama_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    trained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), CONFIGS["lora"], tmp_path / "adapter")
    result = merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert {merged.dtype(key) for key in merged} == {torch.bfloat16}
    assert 0 < result.rounding < 0.1
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
