"""A sped-up model computes what PEFT's model computes, for every layer kind, feature and verb, and is PEFT's else."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file
from torch import nn

from loraloom import slow_down, speed_up
from loraloom.errors import InputError
from loraloom.tuner.speed_up import FastLora
from tests.tuner.speed_up_support import (
    CASES,
    IDS,
    NAME,
    QUANTISED,
    assert_same,
    base_of,
    input_of,
    layer_of,
    model_of,
    pair,
)
from tests.tuner.support import Pair, Toy, randomise

pytestmark = [
    # PEFT's own: a merge into 4 or 8 bits rounds, and a bias of B is taken for a shard when it is saved.
    pytest.mark.filterwarnings("ignore:(Unm|M)erge lora module to .-bit linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]
every_case = pytest.mark.parametrize(("kind", "feature"), CASES, ids=IDS)


def output(model, kind, seed=5):
    torch.manual_seed(seed)  # of dropout
    return model(input_of(kind))


@every_case
def test_outputs_and_gradients_are_pefts(kind, feature):
    results = []
    for model in pair(kind, feature):
        x = input_of(kind).requires_grad_()
        torch.manual_seed(5)
        out = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected, kind)


@every_case
def test_twenty_steps_of_training_are_pefts(kind, feature):
    curves = []
    for model in pair(kind, feature):
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        target = torch.randn(layer_of(model).out_features, generator=torch.Generator().manual_seed(3))
        losses = []
        for step in range(20):
            loss = (output(model, kind, step) - target).square().mean()
            loss.backward()
            adam.step()
            adam.zero_grad()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < curves[0][0]
    # Adam divides by the gradient's size, so a rounding error of a gradient near zero becomes one of the step's size;
    # over twenty steps of 1e-3 that stays under 1e-4 of the loss on float32 adapters and 1e-9 on float64 ones.
    tolerance = 1e-4 if kind in QUANTISED else 1e-9
    torch.testing.assert_close(curves[1], curves[0], rtol=tolerance, atol=0)


def disabled(model, kind):
    with model.disable_adapter():
        return [output(model, kind)]


def switched(model, kind):
    results = []
    for name in reversed([*model.peft_config]):
        model.set_adapter(name)
        results.append(output(model, kind))
    return results


def merged_and_unmerged(model, kind):
    if kind in ("gptq", "awq"):
        pytest.skip("PEFT cannot merge into these bases")
    model.merge_adapter()
    results = [output(model, kind)]
    model.unmerge_adapter()
    return [*results, output(model, kind)]


def deleted(model, kind):
    model.add_adapter("more", LoraConfig(r=2, target_modules=["target"]), autocast_adapter_dtype=False)
    randomise(model, 4)
    model.base_model.set_adapter(["a0", "more"])
    results = [output(model, kind)]
    model.delete_adapter("a0")
    model.set_adapter("more")
    return [*results, output(model, kind)]


def scaled(model, kind):
    layer_of(model).scale_layer(0.5)
    results = [output(model, kind)]
    layer_of(model).set_scale("a0", 3.0)
    return [*results, output(model, kind)]


def in_eval_mode(model, kind):
    with torch.inference_mode():
        results = [output(model.eval(), kind)]
    return [*results, output(model, kind)]


def one_adapter_per_sample(model, kind):
    if kind in ("gptq", "awq", "int8") or any(config.use_dora for config in model.peft_config.values()):
        pytest.skip("PEFT has no mixed batches for DoRA, GPTQ, AWQ, and for 8 bits in training on the CPU")
    return [model.eval()(input_of(kind), adapter_names=["a0", "__base__"])]


def copied(model, kind):
    if kind == "int8":
        pytest.skip("bitsandbytes cannot copy 8-bit weights")
    return [output(copy.deepcopy(model), kind)]


@every_case
@pytest.mark.parametrize(
    "verb",
    [
        disabled,
        switched,
        merged_and_unmerged,
        deleted,
        scaled,
        in_eval_mode,
        one_adapter_per_sample,
        copied,
    ],
    ids=lambda verb: verb.__name__,
)
def test_every_verb_gives_what_it_gives_in_peft(verb, kind, feature):
    theirs, ours = (verb(model, kind) for model in pair(kind, feature))
    for expected, actual in zip(theirs, ours, strict=True):
        assert_same(actual, expected, kind)


@every_case
def test_saved_files_are_bit_for_bit_pefts(kind, feature, tmp_path):
    theirs, ours = pair(kind, feature)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.*"))
    assert any(path.name == "adapter_model.safetensors" for path in files)
    for path in files:
        assert (tmp_path / "ours" / path).read_bytes() == (tmp_path / "theirs" / path).read_bytes()
    assert [*ours.state_dict()] == [*theirs.state_dict()]


@every_case
def test_a_layer_is_what_pefts_layer_is(kind, feature):
    theirs, ours = map(layer_of, pair(kind, feature))
    assert isinstance(ours, type(theirs))
    for attribute in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(ours), attribute) == getattr(type(theirs), attribute)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()


def test_slow_down_gives_pefts_classes_back():
    theirs, ours = pair("linear", "dora among others")
    slow_down(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


def test_speeding_up_twice_is_speeding_up_once():
    _, ours = pair("linear", "lora")
    before = type(layer_of(ours))
    assert speed_up(ours).fast == [NAME]
    assert type(layer_of(ours)) is before


@pytest.mark.parametrize("model", [Pair(), nn.ReLU()], ids=["no adapter", "no linear"])
def test_a_model_without_lora_layers_is_an_error(model):
    with pytest.raises(InputError) as excinfo:
        speed_up(model)
    assert excinfo.value.code == "no-lora-layers"


def test_a_pickle_holds_pefts_layer_and_a_copy_a_fast_one():
    theirs, ours = pair("linear", "dora")
    assert isinstance(layer_of(copy.deepcopy(ours)), FastLora)
    unpickled = pickle.loads(pickle.dumps(ours))
    assert type(layer_of(unpickled)) is lora.Linear
    assert_same(output(unpickled, "linear"), output(theirs, "linear"), "linear")
    assert b"loraloom" not in pickle.dumps(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert type(layer_of(torch.load(buffer, weights_only=False))) is lora.Linear


def test_adapters_added_later_are_covered():
    model = get_peft_model(Pair(), LoraConfig(target_modules=["first"]))
    speed_up(model)
    model.add_adapter("second", LoraConfig(target_modules=["second"], use_dora=True))
    assert isinstance(model.base_model.model.second, FastLora)
    other = get_peft_model(Pair(), LoraConfig(target_modules=["first"]))
    other.add_adapter("second", LoraConfig(target_modules=["second"]))
    assert not any(isinstance(module, FastLora) for module in other.modules())


def test_an_adapter_that_is_loaded_later_is_covered(tmp_path):
    saved = get_peft_model(Pair(), LoraConfig(target_modules=["second"]))
    randomise(saved)
    saved.save_pretrained(tmp_path)
    model = get_peft_model(Pair(), LoraConfig(target_modules=["first"]))
    speed_up(model)
    model.load_adapter(str(tmp_path), "loaded")
    assert isinstance(model.base_model.model.second, FastLora)
    model.set_adapter("loaded")
    model.save_pretrained(tmp_path / "again", selected_adapters=["loaded"])
    again = load_file(tmp_path / "again" / "loaded" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(again[name], tensor)


class Own(lora.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Inherited(lora.Linear):
    pass


@pytest.mark.parametrize(("layer", "fast"), [(Own, False), (Inherited, True)])
def test_a_subclass_with_a_forward_of_its_own_stays(layer, fast):
    config = LoraConfig(target_modules=["target"])
    config._register_custom_module({nn.Linear: layer})
    model = get_peft_model(Toy(nn.Linear(6, 10)), config)
    x = torch.randn(2, 6)
    expected = model(x)
    report = speed_up(model)
    assert (report.fast, [*report.kept]) == (([NAME], []) if fast else ([], [NAME]))
    assert type(layer_of(model)) is Own or isinstance(layer_of(model), FastLora)
    torch.testing.assert_close(model(x), expected)


def test_other_layers_stay_pefts_and_the_report_says_which():
    base = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 10), nn.Unflatten(-1, (10, 1)), nn.Conv1d(10, 4, 1))
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1", "3"]))
    before = [type(module) for module in model.modules()]
    report = speed_up(model)
    assert report.fast == ["base_model.model.1"]
    assert [*report.kept] == ["base_model.model.0", "base_model.model.3"]
    changed = [new for new, old in zip(map(type, model.modules()), before, strict=True) if new is not old]
    assert len(changed) == 1
    text = str(report)
    assert "1 of 3" in text
    assert all(word in text for word in ("Embedding", "Conv1d", "base_model.model.0", "base_model.model.3"))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_hooks_on_the_parts_are_called(part):
    theirs, ours = pair("linear", "dora")
    calls = []
    for model in (theirs, ours):
        getattr(layer_of(model), part)["a0"].register_forward_hook(lambda *_: calls.append(part))
    expected = output(theirs, "linear")
    stock = len(calls)
    assert_same(output(ours, "linear"), expected, "linear")
    assert len(calls) == 2 * stock > 0


def test_hooks_on_the_base_layer_are_called_and_change_the_output():
    theirs, ours = pair("linear", "dora")
    for model in (theirs, ours):
        layer_of(model).base_layer.register_forward_hook(lambda module, args, out: out * 2)
    assert_same(output(ours, "linear"), output(theirs, "linear"), "linear")


def test_a_replaced_forward_is_reported_and_stays():
    model = model_of("linear", "lora")
    layer = layer_of(model)
    layer.forward = lambda x: x.new_zeros(1)
    assert [*speed_up(model).kept] == [NAME]
    assert output(model, "linear").tolist() == [0.0]


@pytest.mark.parametrize("feature", ["lora", "dora"])
def test_editing_weights_in_any_way_is_seen(feature):
    theirs, ours = pair("linear", feature)
    edits = [
        lambda layer: layer.base_layer.weight.data.mul_(1.5),
        lambda layer: setattr(layer.base_layer.weight, "data", layer.base_layer.weight.data * 0.7),
        lambda layer: layer.lora_B["a0"].weight.data.add_(0.3),
        lambda layer: setattr(layer.lora_A["a0"], "weight", nn.Parameter(layer.lora_A["a0"].weight * 2)),
        lambda layer: layer.scaling.update(a0=0.25),
    ]
    for edit in edits:
        for model in (theirs, ours):
            edit(layer_of(model))
        assert_same(output(ours, "linear"), output(theirs, "linear"), "linear")


@pytest.mark.parametrize("feature", ["lora", "dora", "dora, dropout", "three"])
@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_gradients_of_an_unfrozen_base_are_pefts(feature, trainable):
    grads = []
    for model in pair("linear", feature):
        getattr(layer_of(model).base_layer, trainable).requires_grad_()
        output(model, "linear").square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for expected, actual in zip(*grads, strict=True):
        assert_same(actual, expected, "linear")


def test_load_saved_in_plain_peft(tmp_path):
    _, ours = pair("linear", "dora")
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of("linear").double(), tmp_path / "a0", autocast_adapter_dtype=False)
    assert_same(output(loaded.double(), "linear"), output(ours.eval(), "linear"), "linear")
