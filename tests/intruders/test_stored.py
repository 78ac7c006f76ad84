"""Adapters in files give what the same adapters in a model give, and change nothing else by a bit."""

import json
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from loraloom.adapter.live import LiveAdapter
from loraloom.errors import InputError
from loraloom.intruders.live import find_intruders, reduce_intruders
from loraloom.intruders.stored import find_stored_intruders, reduce_stored_intruders, sweep_stored
from tests.refusals import coded
from tests.tuner.support import ALL_PARTS, FLOAT_KINDS, Toy, adapted, make_base, randomise

from . import support

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS = {"epsilon": 0.97, "top_k": 4}  # so that small random layers have intruders


def lora_adapted(kind, **kwargs):
    """PEFT's LoRA on the toy layer; "square" is a Conv1D whose files do not show that it is stored transposed."""
    base = Toy(Conv1D(6, 6)).eval() if kind == "square" else make_base(kind)
    if kind == "square":
        nn.init.normal_(base.target.weight)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["target"], fan_in_fan_out=kind in ("conv1d", "square"), **kwargs
    )
    model = peft.get_peft_model(base, config).eval()
    randomise(model)
    return model


MAKERS = {f"loom {kind}": partial(adapted, ALL_PARTS, kind) for kind in FLOAT_KINDS}
MAKERS |= {f"lora {kind}": partial(lora_adapted, kind) for kind in (*FLOAT_KINDS, "square")}
MAKERS |= {
    "lora dora": partial(lora_adapted, "linear", use_dora=True),
    "lora dora conv2d": partial(lora_adapted, "conv2d", use_dora=True),
    "lora bias": partial(lora_adapted, "linear", lora_bias=True),
    "lora rslora": partial(lora_adapted, "linear", use_rslora=True),
    "loom pissa": partial(adapted, ALL_PARTS, "linear", init_lora_weights="pissa"),
}
EVERY_LAYER = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
# PEFT's notices about toy models, and about a copy with a bias.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:Adapter '\w+'. 1 LoRA tensor"),
]


def stored(model, folder):
    """The folders of the adapter and of its base."""
    weights = model.base_model.model.target.get_base_layer().state_dict()
    (folder / "base").mkdir(parents=True)
    save_file(
        {f"target.{name}": value.contiguous() for name, value in weights.items()}, folder / "base/model.safetensors"
    )
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter", folder / "base"


def assert_same_numbers(one, other):
    for a, b in zip(one.layers, other.layers, strict=True):
        mine, reference = a.to_dict(), b.to_dict()
        for key, value in reference.items():
            known = isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float))
            assert mine[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if known else value), key


@EVERY_LAYER
def test_what_is_found_and_written_is_what_the_model_gives(make, tmp_path):
    model = make()
    adapter, base = stored(model, tmp_path)
    files = {file: file.read_bytes() for file in (*adapter.iterdir(), *base.iterdir())}
    assert_same_numbers(find_stored_intruders(adapter, base, **OPTIONS), find_intruders(model, **OPTIONS))
    for rank in ("exact", "keep"):
        out = tmp_path / str(rank)
        report = reduce_stored_intruders(adapter, out, base, 0.5, "all", rank, **OPTIONS)
        reference = reduce_intruders(model, new_adapter=f"model_{rank}", scale=0.5, scope="all", rank=rank, **OPTIONS)
        assert report.count == reference.count > 0
        assert report.errors == pytest.approx(reference.errors, abs=1e-5)
        model.load_adapter(out, "again")
        loaded, wanted = (next(iter(LiveAdapter(model, name).modules.values())) for name in ("again", f"model_{rank}"))
        assert loaded.rank == wanted.rank
        assert loaded.parts().keys() == wanted.parts().keys()
        torch.testing.assert_close(loaded.adapted_weight(), wanted.adapted_weight(), rtol=1e-5, atol=1e-5)
        model.delete_adapter("again")
    assert files == {file: file.read_bytes() for file in files}


@EVERY_LAYER
def test_a_scale_of_one_writes_the_same_tensors(make, tmp_path):
    adapter, base = stored(make(), tmp_path)
    reduce_stored_intruders(adapter, tmp_path / "out", base, 1.0, "all", **OPTIONS)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads((adapter / CONFIG).read_text())


@pytest.mark.parametrize("rank", [1000, 10**9])
@pytest.mark.parametrize(
    "make",
    [
        partial(adapted, {}, "linear", init_lora_weights="pissa"),
        partial(adapted, ALL_PARTS, "linear", init_lora_weights="olora"),
        partial(lora_adapted, "linear"),
        partial(lora_adapted, "conv1d"),
    ],
    ids=["pissa", "olora, all parts", "lora", "conv1d"],
)
def test_a_rank_above_both_sides_is_that_of_the_side_and_loads_again(make, rank, tmp_path):
    """PiSSA starts from as many singular vectors as the rank: more than a side has cannot be loaded."""
    model = make()
    adapter, base = stored(model, tmp_path)
    reduce_stored_intruders(adapter, tmp_path / "exact", base, 0.5, "all", "exact", **OPTIONS)
    reduce_stored_intruders(adapter, tmp_path / "large", base, 0.5, "all", rank, **OPTIONS)
    for name in ("exact", "large"):
        model.load_adapter(tmp_path / name, name)
    exact, large = (next(iter(LiveAdapter(model, name).modules.values())) for name in ("exact", "large"))
    assert large.rank == max(4, min(large.shape))
    torch.testing.assert_close(large.adapted_weight(), exact.adapted_weight(), rtol=1e-5, atol=1e-5)
    # and the same of a live model
    reduce_intruders(model, new_adapter="live", scale=0.5, scope="all", rank=rank, **OPTIONS)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["live"], save_embedding_layers=False)
    model.load_adapter(tmp_path / "saved" / "live", "again")
    again = next(iter(LiveAdapter(model, "again").modules.values()))
    torch.testing.assert_close(again.adapted_weight(), exact.adapted_weight(), rtol=1e-5, atol=1e-5)


def test_heads_biases_and_ranks_of_a_real_network(pico_bert_dir, tmp_path):
    """Two layers of BERT with saved head and biases; one module has a rank of its own."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["query", "dense"],
        exclude_modules=".*pooler.*",
        rank_pattern={"layer.1.attention.self.query": 2},
        bias="all",
    )
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(pico_bert_dir), config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    report = reduce_stored_intruders(tmp_path / "adapter", tmp_path / "out", None, 0.0, "top", epsilon=0.7)
    assert report.count > 0
    before, after = load_file(tmp_path / "adapter" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    twice = (".modules_to_save.", ".original_module.")  # what PEFT saves a second time with bias="all"
    others = [key for key in before if "lora_" not in key and not any(name in key for name in twice)]
    assert len(others) > 10
    assert all(torch.equal(before[key], after[key]) for key in others)
    base = AutoModelForSequenceClassification.from_pretrained(pico_bert_dir)
    again = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    reduce_intruders(model, new_adapter="new", scale=0.0, epsilon=0.7)
    model.set_adapter("new")
    inputs = torch.randint(5, 40, (3, 7))
    torch.testing.assert_close(again(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["top", "all"])
def test_a_sweep_counts_and_measures_what_is_left(scope, tmp_path):
    W = support.base(60, 40)
    A, B = support.update(W, r=12, strength=3.0)
    base = Toy(nn.Linear(40, 60, bias=False))
    base.target.weight.data = W
    model = peft.get_peft_model(base, LoraConfig(r=12, lora_alpha=12, target_modules=["target"]))
    layer = model.base_model.model.target
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    adapter, base_folder = stored(model, tmp_path)
    scales = [1.0, 0.7, 0.2, 0.0]
    swept = sweep_stored(adapter, scales, base_folder, scope, top_k=5, epsilon=0.6)
    changed = support.adapted(W, A, B)
    delta = changed - W.double()
    assert swept.intruders.count > 1
    for scale, point in zip(scales, swept.points, strict=True):
        milder, _ = support.mitigated(W, changed, scale, scope, top_k=5, epsilon=0.6)
        left = int((support.cosines(W, milder, 5) < 0.6).sum())
        change = float((milder - changed).norm() / delta.norm())
        assert point.metrics == pytest.approx({"relative_change": change, "remaining_intruders": left}, abs=1e-4)
        assert point.error == 0.0
    kept = sweep_stored(adapter, scales, base_folder, scope, "keep", top_k=5, epsilon=0.6)
    assert [point.error > 1e-3 for point in kept.points] == [False, True, True, True]


@pytest.fixture
def lora(tmp_path):
    return stored(lora_adapted("linear"), tmp_path)


def edit(folder, **config):
    values = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))


def test_a_base_that_is_another_one(lora, tmp_path):
    adapter, base = lora
    with pytest.raises(InputError, check=coded("no-base")):
        find_stored_intruders(adapter)
    save_file({"other.weight": torch.ones(10, 6)}, base / "model.safetensors")
    with pytest.raises(InputError, check=coded("unresolved")):
        find_stored_intruders(adapter, base)
    save_file({"target.weight": torch.ones(10, 7)}, base / "model.safetensors")
    with pytest.raises(InputError, check=coded("shape")):
        reduce_stored_intruders(adapter, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_folders_that_must_not_be_written(lora, tmp_path):
    adapter, base = lora
    with pytest.raises(InputError, check=coded("folder-is-read")):
        reduce_stored_intruders(adapter, adapter, base, overwrite=True)
    with pytest.raises(InputError, check=coded("folder-is-read")):
        reduce_stored_intruders(adapter, base, base)


def test_adapters_that_cannot_be_analysed(lora, tmp_path):
    adapter, base = lora
    edit(adapter, init_lora_weights="pissa_niter_4")
    with pytest.raises(InputError) as error:
        find_stored_intruders(adapter, base)
    assert error.value.code == "altered-base"
    edit(adapter, init_lora_weights=True)
    with pytest.raises(ValueError, match="scale=-1"):
        reduce_stored_intruders(adapter, tmp_path / "out", base, -1)
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(InputError) as error:
        find_stored_intruders(adapter, base)
    assert error.value.code == "not-finite"


@pytest.mark.filterwarnings("ignore:member .* stays out:UserWarning")
def test_a_composition_can_be_looked_at_but_not_changed(pico_bert_dir, tmp_path):
    from loraloom import compose

    for name in ("one", "two"):
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        member = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(pico_bert_dir), config)
        randomise(member, seed=len(name))
        member.save_pretrained(tmp_path / name)
    base = AutoModelForSequenceClassification.from_pretrained(pico_bert_dir)
    model = compose(base, {name: str(tmp_path / name) for name in ("one", "two")}, weights="uniform")
    model.save_pretrained(tmp_path / "composed")
    found = find_stored_intruders(tmp_path / "composed/composition", pico_bert_dir, epsilon=0.7)
    assert found.count > 0
    assert {layer.rank for layer in found.layers} == {4}
    with pytest.raises(InputError, check=coded("composition")):
        reduce_stored_intruders(tmp_path / "composed/composition", tmp_path / "out", pico_bert_dir)
