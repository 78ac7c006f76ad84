"""Models that read a layer's weight instead of calling it: found by their source, and given the adapted weight."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from loraloom import LoomConfig
from loraloom.errors import InputError
from loraloom.tuner.weight_reads import modules_read
from tests.tuner.support import ALL_PARTS, assert_near, randomise


class Reads(nn.Module):
    """A "kernel" that takes the weights of two layers, by a method, and calls a third."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.asked = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"deep": nn.Linear(6, 6)})

    def kernel(self, x):
        return F.linear(F.linear(x, self.read.weight, self.read.bias), self.inner.deep.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        return self.asked(torch.tanh(self.called(torch.tanh(self.kernel(x)))))

    def initialise(self):
        self.called.weight.data.zero_()  # forward cannot reach this


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Reads()

    def forward(self, x):
        return self.child(x) @ self.child.called.weight


def test_reads_are_found_by_their_source():
    assert modules_read(Reads()) == {"read", "inner.deep"}
    assert modules_read(Parent()) == {"child.read", "child.inner.deep", "child.called"}
    assert modules_read(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == set()


@pytest.mark.parametrize("parts", [{}, ALL_PARTS], ids=["lora", "all"])
def test_forward_is_the_merged_model_and_everything_trains(parts):
    model = get_peft_model(Parent(), LoomConfig(r=2, target_modules="all-linear", **parts)).eval()
    randomise(model)
    x = torch.randn(3, 6)
    output = model(x)
    output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        assert (output - base).abs().max() > 1e-2
        assert_near(model.merge_and_unload()(x), output.detach(), factor=10)


@pytest.mark.parametrize("eval_fast_path", [True, False])
def test_torchs_transformer_layer_in_both_of_its_paths(eval_fast_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="relu")
    model = get_peft_model(layer, LoomConfig(r=2, target_modules=["linear1", "linear2", "out_proj"])).eval()
    randomise(model)
    x = torch.randn(2, 5, 8)
    slow = model(x)  # with gradients torch takes the slow path
    with torch.set_grad_enabled(not eval_fast_path):
        assert_near(model(x).detach(), slow.detach(), factor=10)
        assert_near(model.merge_and_unload()(x).detach(), slow.detach(), factor=10)


def test_one_batch_cannot_have_several_weights():
    model = get_peft_model(Reads(), LoomConfig(r=2, target_modules=["read"])).eval()
    with pytest.raises(InputError) as raised:
        model(torch.randn(2, 6), adapter_names=["default", "__base__"])
    assert raised.value.code == "weight-is-read"
