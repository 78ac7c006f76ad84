"""A composition is saved, loaded, merged and unmerged as one adapter."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from loraloom import compose
from loraloom.adapter.open import open_adapter
from loraloom.composition import learned_weights
from loraloom.io.checkpoint import read_json
from tests.composition.support import LINEARS, LOGITS, WEIGHTS, base, ids, set_logits, summed
from tests.tuner.support import assert_near


def trained(members, **options):
    model = compose(base(), members, **options)
    set_logits(model)
    return model.eval()


@pytest.fixture
def saved(members, tmp_path):
    trained(members).save_pretrained(tmp_path)
    return tmp_path / "composition"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loading_restores_every_bit(members, tmp_path, scope, dtype, low_cpu_mem_usage):
    model = compose(base().to(dtype), members, scope=scope).eval()
    set_logits(model)
    model.save_pretrained(tmp_path)
    where = tmp_path / "composition"
    loaded = PeftModel.from_pretrained(base().to(dtype), where, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    ours, theirs = ({n: p for n, p in m.named_parameters() if ".loom_" in n} for m in (model, loaded))
    assert len(ours) == len(theirs) == 3 * 5 + 2
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(model(ids()), loaded(ids()))
    assert learned_weights(loaded, "default") == learned_weights(model)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("scope", ["layer", "module_type"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_training_goes_on_after_loading_as_it_would_have(members, tmp_path, scope, low_cpu_mem_usage):
    model = compose(base(), members, scope=scope).train()
    model.save_pretrained(tmp_path)
    where = tmp_path / "composition"
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(base(), where, "composition", **options).train()
    for m in (model, loaded):
        parameters = [p for p in m.parameters() if p.requires_grad]
        assert len(parameters) == 5
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            m(ids(step)).square().mean().backward()
            optimizer.step()
    assert learned_weights(loaded) == learned_weights(model)
    weights = learned_weights(model).layers
    assert (weights["layers.0"] == weights["layers.1"]) is False  # other members there
    assert not any(w == 0.5 for w in weights["plain"].values())


def test_the_file_says_where_members_come_from(members, saved):
    composition = read_json(saved / "adapter_config.json")["composition"]
    assert [m["name"] for m in composition["members"]] == list(members)
    for member in composition["members"]:
        assert member["source"] == str(members[member["name"]])
        assert member["sha256"] == open_adapter(members[member["name"]]).sha256


def test_tools_that_read_files_see_the_weighted_sum(members, tmp_path):
    model = compose(base(), members, WEIGHTS)
    model.save_pretrained(tmp_path)
    stored = open_adapter(tmp_path / "composition")
    assert not stored.others
    for module in stored.modules:
        layer = model.get_base_model().get_submodule(module)
        A, B = stored.modules[module].factors()
        assert_near(layer.as_weight(B @ A), layer.get_delta_weight("composition"))
        bias, expected = stored.modules[module].bias(), layer.bias_delta("composition")
        assert (bias is None) == (expected is None)
        if bias is not None:
            assert torch.equal(bias, expected)


@pytest.mark.parametrize("weights", ["learned", WEIGHTS], ids=["learned", "given"])
def test_merging_gives_the_same_output_and_unmerging_every_bit(members, weights):
    model = compose(base(), members, weights).eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids())
        model.merge_adapter()
        assert_near(model(ids()), expected, factor=3)
        model.unmerge_adapter()
        assert torch.equal(model(ids()), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    merged = model.merge_and_unload()
    assert type(merged.layers[0]) is nn.Linear
    with torch.no_grad():
        assert_near(merged(ids()), expected, factor=3)


def test_two_compositions_merge_into_their_sum(members):
    model = compose(base(), members, WEIGHTS, adapter_name="one").eval()
    compose(model, {"fever": members["fever"]}, {"fever": 2.0}, adapter_name="two").eval()
    model.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        expected = summed(WEIGHTS | {"fever": WEIGHTS["fever"] + 2.0})(ids())
        assert_near(model(ids()), expected, factor=3)
        model.merge_adapter(["one", "two"])
        assert_near(model(ids()), expected, factor=3)
        model.unmerge_adapter()
        assert torch.equal(model.get_base_model().conv.get_base_layer().bias, base().conv.bias)


def test_a_member_bias_is_not_merged_where_the_layer_has_none(members):
    net = base()
    model = compose(net, members, "uniform")
    net.layers[0].base_layer.bias = None
    before = net.layers[0].base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="bias of a layer that has none"):
        model.merge_adapter()
    assert torch.equal(net.layers[0].base_layer.weight, before)


def edit_config(folder, edit):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    edit(config["composition"])
    path.write_text(json.dumps(config))


def take_out_a_member(composition):
    composition["members"].pop()


def take_out_a_member_and_its_ranks(composition):
    composition["members"].pop()
    for module, ranks in composition["ranks"].items():
        composition["ranks"][module] = ranks[:2] if any(ranks[:2]) else [1, 0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (take_out_a_member, "ranks for 3 members, but there are 2"),
        (take_out_a_member_and_its_ranks, "have another size"),
        (lambda c: c["ranks"]["plain"].__setitem__(0, 1), "have another size"),
        (lambda c: c["biased"].clear(), "loom_member_bias"),
        (lambda c: c.update(wings=2), "wings"),
        (lambda c: c.pop("ranks"), "ranks is missing"),
        (lambda c: c.update(constraint="sigmoid"), "sigmoid"),
        (lambda c: c["ranks"].pop("plain"), "have no module here"),
        (lambda c: c["ranks"].update({"layers.7": [1, 1, 1]}), r"layers\.7.*another base model"),
    ],
)
def test_a_broken_configuration_is_an_error(saved, edit, message):
    edit_config(saved, edit)
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(base(), saved)


@pytest.mark.parametrize("part", [LOGITS, "loom_lora_A", "loom_member_bias"])
def test_a_missing_tensor_is_an_error(saved, part):
    path = saved / "adapter_model.safetensors"
    state = load_file(path)
    state.pop(next(key for key in state if part in key))
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=part):
        PeftModel.from_pretrained(base(), saved)


def test_a_module_whose_name_ends_like_a_member_s_is_left_alone(members, tmp_path):

    squad = {"squad": members["squad"]}
    net = base()
    net.inner = nn.ModuleDict({"plain": nn.Linear(18, 7, bias=False)})
    model = compose(net, squad)
    assert type(model.get_base_model().inner["plain"]) is nn.Linear
    assert set(learned_weights(model).layers) == {*LINEARS, "embed"}
