"""Several adapters on one model: sums, switching, mixed batches, disabling, deleting, merging some of them."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from loraloom import LoomConfig
from tests.tuner.support import (
    ALL_PARTS,
    FLOAT_KINDS,
    KINDS,
    PART_IDS,
    PARTS,
    Dense,
    Pair,
    adapter_tensors,
    assert_near,
    make_base,
    make_input,
    randomise,
    with_adapter,
)

CONFIGS = {"default": ALL_PARTS, "plain": {}, "mixed": {"use_mixer": "kaiming", "r": 2}, "dora": {"use_dora": True}}


def several(kind="linear", dtype=torch.float32, configs=CONFIGS):
    model = None
    for name, parts in configs.items():
        values = {"r": 4, "lora_alpha": 6, "target_modules": ["target"]} | parts
        if model is None:
            model = get_peft_model(make_base(kind, dtype), LoomConfig(**values), name)
        else:
            model.add_adapter(name, LoomConfig(**values))
    randomise(model)
    return model.eval()


def alone(model, name, x):
    model.base_model.set_adapter([name])
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("kind", KINDS)
def test_active_adapters_add_their_updates(kind):
    model, x = several(kind), make_input(kind)
    base = Dense.of(kind, make_base(kind).target)(x)
    updates = {name: alone(model, name, x) - base for name in CONFIGS}
    for active in (["plain", "mixed"], ["plain", "mixed", "default"], ["dora", "default"], list(CONFIGS)):
        model.base_model.set_adapter(active)
        with torch.no_grad():
            assert_near(model(x), base + sum(updates[name] for name in active), torch.float32, factor=3)


@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
def test_gradients_of_active_adapters_are_those_of_the_dense_formula(parts):
    configs = {"a": parts, "b": parts | {"r": 3}, "c": {}}
    model, x = several(configs=configs), make_input("linear")
    model.base_model.set_adapter(list(configs))
    weight = torch.randn(2, 5, 10)
    (model(x) * weight).sum().backward()

    dense = Dense.of("linear", make_base("linear").target)
    output, expected = dense(x) * (1 - len(configs)), {}
    for name, chosen in configs.items():
        t = {key: value.requires_grad_() for key, value in adapter_tensors(model, name).items()}
        update = dense.adapted_weight({k: v for k, v in t.items() if k != "m"}, {"use_rslora": False} | chosen)
        norm = update.norm(dim=1, keepdim=True).detach()  # a constant in the backward pass
        W = t["m"].reshape(-1, 1) * update / norm if "m" in t else update
        output, expected[name] = output + dense(x, W), t
    (output * weight).sum().backward()
    attribute = {
        "A": "lora_A",
        "B": "lora_B",
        "M": "mixer",
        "g": "gate_lora_magnitude_vector",
        "m": "lora_magnitude_vector",
    }
    named = dict(model.named_parameters())
    for name, tensors in expected.items():
        for part, tensor in tensors.items():
            ours = named[f"base_model.model.target.loom_{attribute[part]}.{name}.weight"].grad
            assert_near(ours, tensor.grad, factor=3)


def test_only_active_adapters_train():
    model = several()
    model.base_model.set_adapter(["plain", "dora"])
    training = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert training == {"plain", "dora"}
    model.set_adapter("mixed")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"mixed"}
    assert model.active_adapter == "mixed"


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_a_mixed_batch_gives_each_row_its_own_adapter(kind):
    model, x = several(kind), make_input(kind).repeat_interleave(3, dim=0)
    names = ["default", "__base__", "plain", "dora", "mixed", "default"]
    rows = {name: alone(model, name, x) for name in CONFIGS}
    with torch.no_grad():
        rows["__base__"] = Dense.of(kind, make_base(kind).target)(x)
        output = model(x, adapter_names=names)
    for i, name in enumerate(names):
        assert_near(output[i], rows[name][i], torch.float32, factor=3)


def test_mixed_batches_reject_wrong_names_counts_and_training():
    model, x = several(), make_input("linear")
    with pytest.raises(ValueError, match="unknown"):
        model(x, adapter_names=["unknown", "plain"])
    with pytest.raises(ValueError, match="1"):
        model(x, adapter_names=["plain"])
    with pytest.raises(ValueError, match="eval"):
        model.train()(x, adapter_names=["plain", "plain"])


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_gives_the_base_exactly_and_enabling_gives_the_adapter_back(kind):
    model, x = several(kind), make_input(kind)
    with torch.no_grad():
        adapted, base = model(x), make_base(kind).train()(x)  # in eval, bitsandbytes repacks NF4 on some CPUs
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), adapted)
        assert not torch.equal(adapted, base)


def test_disabling_works_while_merged():
    model, x = several(), make_input("linear")
    expected = alone(model, "default", x)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), make_base("linear")(x))
    with torch.no_grad():
        assert_near(model(x), expected)


def test_deleting_an_adapter_leaves_the_others_and_nothing_of_itself():
    model, x = several(), make_input("linear")
    expected = alone(model, "mixed", x)
    model.delete_adapter("default")
    model.set_adapter("mixed")
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert not [n for n in model.state_dict() if ".default" in n]
    layer = model.get_base_model().target
    attributes = [v for v in vars(layer).values() if isinstance(v, dict)] + list(layer.children())
    assert not any("default" in holder for holder in attributes if hasattr(holder, "__contains__"))


def test_an_adapter_can_be_added_after_training_without_touching_the_first():
    model, x = with_adapter(make_base("linear"), ALL_PARTS), make_input("linear")
    randomise(model)
    with torch.no_grad():
        expected = model(x)
        model.add_adapter("other", LoomConfig(r=2, target_modules=["target"], use_dora=True))
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("order", [["plain", "mixed"], ["dora", "plain"], ["plain", "dora"], ["default", "dora"]])
def test_merging_several_is_their_sum_and_unmerging_restores_every_bit(order):
    model, x = several(), make_input("linear")
    layer = model.get_base_model().target
    before = layer.get_base_layer().weight.detach().clone()
    model.base_model.set_adapter(order)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter(adapter_names=order)
        assert_near(model(x), expected, factor=5)
        model.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().weight, before)
        assert torch.equal(model(x), expected)


def test_merging_twice_warns_and_changes_nothing():
    model = several()
    model.merge_adapter(adapter_names=["plain"])
    weight = model.get_base_model().target.get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning, match="already"):
        model.merge_adapter(adapter_names=["plain"])
    assert torch.equal(model.get_base_model().target.get_base_layer().weight, weight)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_base_alone():
    model = several()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "loom_lora_B.plain" in n)[0, 0] = float("nan")
    before = model.get_base_model().target.get_base_layer().weight.detach().clone()
    with pytest.raises(ValueError, match="plain"):
        model.merge_adapter(adapter_names=["plain"], safe_merge=True)
    assert torch.equal(model.get_base_model().target.get_base_layer().weight, before)


def test_safe_merge_refuses_what_the_dtype_of_the_base_cannot_hold():
    model = with_adapter(make_base("linear", torch.float16))
    layer = model.get_base_model().target
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.factor("A", "default").fill_(1e3)
        layer.factor("B", "default").fill_(1e3)
    with pytest.raises(ValueError, match="infinity"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_added_while_another_is_merged_starts_from_the_unmerged_base(kind):
    model, x = several(kind, configs={"plain": {}}), make_input(kind)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT does, once the adapter is there
        model.add_adapter("dora", LoomConfig(target_modules=["target"], use_dora=True))
    model.set_adapter("dora")
    with torch.no_grad():
        assert_near(model(x), Dense.of(kind, make_base(kind).target)(x), torch.float32)


@pytest.mark.parametrize("target", ["embed", ["embed", "head"]])
def test_a_tied_weight_is_not_merged(target):
    """Merging into one of two layers that share a weight would change the other as well."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    model = get_peft_model(Tied(), LoomConfig(target_modules=target))
    before = model.get_base_model().head.weight.detach().clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"embed shares its weight with head"):
            merge()
    assert torch.equal(model.get_base_model().head.weight, before)


def test_adapters_on_different_layers_do_not_meet():
    model = get_peft_model(Pair(), LoomConfig(target_modules=["first"], **ALL_PARTS), "a")
    model.add_adapter("b", LoomConfig(target_modules=["second"], use_mixer="orthogonal"))
    randomise(model)
    x = torch.randn(3, 8)
    first, second = model.get_base_model().first, model.get_base_model().second
    with torch.no_grad():
        model.base_model.set_adapter(["a", "b"])
        both = model(x)
        model.set_adapter("a")
        assert_near(model(x), second.get_base_layer()(torch.tanh(first(x))))
        model.set_adapter("b")
        assert_near(model(x), second(torch.tanh(first.get_base_layer()(x))))
        assert not torch.equal(both, model(x))


@pytest.mark.parametrize("many", [2, 5])
def test_unload_returns_the_untouched_base(many):
    model, x = several(configs={str(i): ALL_PARTS for i in range(many)}), make_input("linear")
    base = model.unload()
    assert type(base.target) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(base(x), make_base("linear")(x))
