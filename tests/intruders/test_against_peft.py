"""PEFT 0.21's reduce_intruder_dimension: the same results where it works, and right ones where it does not."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom.adapter.live import LiveAdapter
from loraloom.intruders.live import find_intruders, reduce_intruders
from tests.intruders.support import base, cosines, mitigated, update
from tests.refusals import coded
from tests.tuner.support import Toy, nf4_linear, randomise


class Stack(nn.Module):
    """Square, tall and wide linear layers, and a head."""

    def __init__(self):
        super().__init__()
        self.square, self.tall, self.wide = nn.Linear(48, 48), nn.Linear(48, 80), nn.Linear(80, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.wide(torch.tanh(self.tall(torch.tanh(self.square(x))))))


def trained(model=None, targets=("square", "tall", "wide"), strength=1.5, **kwargs):
    """A model with an adapter that has intruders and other directions, and a head that differs from the base's."""
    model = Stack() if model is None else model
    for name in targets:
        weight = model.get_submodule(name).weight
        if weight.dtype.is_floating_point:
            with torch.no_grad():
                weight.copy_(base(*weight.shape[:2]).reshape(weight.shape))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(targets), **kwargs)
    model = get_peft_model(model, config)
    for layer in LiveAdapter(model, "default").modules.values():
        if isinstance(layer.layer.get_base_layer(), nn.Linear):
            A, B = update(layer.weight(), strength=strength)
            layer.layer.lora_A["default"].weight.data.copy_(A)
            layer.layer.lora_B["default"].weight.data.copy_(B / 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name or "lora_B.default.bias" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def delta(model, name, adapter):
    return model.get_submodule(f"base_model.model.{name}").get_delta_weight(adapter).detach()


def of_peft(model, **kwargs):
    """PEFT's mitigation of a copy of the model, and what it printed."""
    theirs, lines = copy.deepcopy(model), []
    reduce_intruder_dimension(theirs, new_adapter_name="new", logging_sink=lines.append, **kwargs)
    return theirs, lines


@pytest.mark.parametrize("scale", [0.75, 0.9])  # further from 1, the float32 SVDs of PEFT are what differs
def test_the_same_intruders_and_at_rank_keep_the_same_weights(scale):
    model = trained()
    theirs, lines = of_peft(model, mitigation_lambda=scale)
    report = reduce_intruders(model, new_adapter="new", scale=scale, scope="all", rank="keep")
    printed = [line.split("Intruders: ")[1] for line in lines if "Intruders: " in line]
    assert [str(len(layer.intruders)) for layer in report.layers if layer.intruders] == printed
    assert len(printed) == 3
    for name in ("square", "tall", "wide"):
        a, b = delta(model, name, "new").detach(), delta(theirs, name, "new").detach()
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_the_rank_of_the_adapter_loses_much_of_the_mitigation_and_an_exact_one_nothing():
    """PEFT truncates to r without a word; the share of the mitigation that is lost is what docs/intruders.md quotes."""
    model = trained()
    theirs, _ = of_peft(model, mitigation_lambda=0.75)
    report = reduce_intruders(model, new_adapter="new", scale=0.75, scope="all")
    for layer in LiveAdapter(model, "default").modules.values():
        target, count = mitigated(layer.weight(), layer.adapted_weight().double(), 0.75, "all")
        wanted = target - layer.adapted_weight().double()
        got = delta(model, layer.name, "new").double() - delta(model, layer.name, "default").double()
        peft = delta(theirs, layer.name, "new").double() - delta(model, layer.name, "default").double()
        assert count > 0
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4
        assert float((peft - wanted).norm() / wanted.norm()) > 0.05
        assert report.errors[layer.name] == 0


class OneConv1D(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.target = Conv1D(outputs, inputs)

    def forward(self, x):
        return self.target(x)


def conv1d(inputs, outputs):
    model = OneConv1D(inputs, outputs)
    with torch.no_grad():
        model.target.weight.copy_(base(inputs, outputs))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["target"], fan_in_fan_out=True))
    layer = next(iter(LiveAdapter(model, "default").modules.values()))
    A, B = update(layer.weight())
    layer.layer.lora_A["default"].weight.data.copy_(A)
    layer.layer.lora_B["default"].weight.data.copy_(B / 2)
    return model


def test_a_square_conv1d_is_not_taken_for_its_transpose():
    model = conv1d(48, 48)
    layer = next(iter(LiveAdapter(model, "default").modules.values()))
    target, count = mitigated(layer.weight(), layer.adapted_weight().double(), 0.5, "all")
    theirs, _ = of_peft(model, mitigation_lambda=0.5)
    reduce_intruders(model, new_adapter="new", scale=0.5, scope="all")
    wanted = (target - layer.weight().double()).T
    assert count > 0
    assert float((delta(model, "target", "new") - wanted).norm() / wanted.norm()) < 1e-4
    assert float((delta(theirs, "target", "new") - wanted).norm() / wanted.norm()) > 0.5


def embedding():
    return Toy(nn.Embedding(60, 40))


def convolution():
    return Toy(nn.Conv2d(8, 24, 3))


def nf4():
    base = Toy(nf4_linear(64, 32, torch.float32))
    base.is_loaded_in_4bit = True
    return base


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (embedding, torch.arange(6)),
        (convolution, torch.ones(1, 8, 5, 5)),
        (nf4, torch.ones(2, 64)),
        (lambda: conv1d(48, 80), torch.ones(2, 48)),
    ],
    ids=["embedding", "conv2d", "nf4", "conv1d"],
)
def test_layers_on_which_peft_fails(make, x):
    model = make()
    if not hasattr(model, "peft_config"):
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["target"]))
        randomise(model)
    layer = next(iter(LiveAdapter(model, "default").modules.values()))
    with pytest.raises((RuntimeError, UserWarning)):  # the warning is torch's, about x.T of a kernel
        of_peft(model, threshold_epsilon=0.9)[0](x)
    target, count = mitigated(layer.weight(), layer.adapted_weight().double(), 0.5, "all", epsilon=0.9)
    reduce_intruders(model, new_adapter="new", scale=0.5, scope="all", epsilon=0.9)
    new = next(iter(LiveAdapter(model, "new").modules.values()))
    assert count > 0
    assert float((new.adapted_weight() - target).norm() / target.norm()) < 1e-5


def test_heads_biases_and_magnitudes_are_copied():
    model = trained(modules_to_save=["head"], lora_bias=True)
    x = torch.randn(4, 48)
    theirs, _ = of_peft(model, mitigation_lambda=1.0)
    reduce_intruders(model, new_adapter="new", scale=1.0)
    before = model(x)
    for m in (model, theirs):
        m.set_adapter("new")
    assert torch.equal(model(x), before)
    assert not torch.allclose(theirs(x), before, atol=0.1)


def test_dora_magnitudes_are_copied():
    model = trained(use_dora=True)
    randomise(model)
    x = torch.randn(4, 48)
    theirs, _ = of_peft(model, mitigation_lambda=1.0)
    reduce_intruders(model, new_adapter="new", scale=1.0, scope="all")
    before = model(x)
    for m in (model, theirs):
        m.set_adapter("new")
    assert torch.equal(model(x), before)
    assert not torch.allclose(theirs(x), before, atol=0.01)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")  # it did, when it was trained
def test_base_and_old_adapter_stay_with_inits_that_take_from_the_base(init):
    model = get_peft_model(Stack(), LoraConfig(r=8, target_modules=["square", "tall"], init_lora_weights=init))
    randomise(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    theirs, _ = of_peft(model)
    report = reduce_intruders(model, new_adapter="new", scale=0.5, scope="all", rank="keep")
    after = model.state_dict()
    assert report.count > 0
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not all(torch.equal(theirs.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(ValueError, check=coded("altered-base", "keep")):
        reduce_intruders(model, new_adapter="exact", scale=0.5, scope="all")


def test_layers_without_this_adapter_are_passed_over():
    model = trained(targets=("square", "tall"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["square", "wide"]))
    with pytest.raises(KeyError):
        of_peft(model)
    report = reduce_intruders(model, new_adapter="new", scale=0.5)
    assert [layer.name for layer in report.layers] == ["square", "tall"]
    assert "new" not in model.base_model.model.wide.lora_A


def test_a_report_and_nothing_printed(capsys):
    model = trained()
    report = find_intruders(model)
    reduce_intruders(model, new_adapter="new")
    assert capsys.readouterr().out == ""
    for layer, found in zip(LiveAdapter(model, "default").modules.values(), report.layers, strict=True):
        clear = cosines(layer.weight(), layer.adapted_weight())
        assert found.intruders == (clear < 0.5).nonzero()[:, 0].tolist()
        assert found.cosines == pytest.approx(clear.tolist(), abs=1e-3)
