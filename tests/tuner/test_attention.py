"""nn.MultiheadAttention as a target: input projection and output projection, in all of torch's paths."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from loraloom import LoomConfig
from loraloom.errors import InputError
from tests.tuner.support import assert_near, randomise

PARTS = {"lora": {}, "mixer and gate": {"use_mixer": "orthogonal", "use_gate": True}}


class Attends(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def base(make=Attends):
    torch.manual_seed(0)
    return make()


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)


@pytest.mark.parametrize("make", [Attends, encoder])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_trains_merges_disables_and_loads(parts, make, tmp_path):
    targets = ["attention"] if make is Attends else ["self_attn", "linear1"]
    model = get_peft_model(base(make), LoomConfig(r=2, target_modules=targets, **parts)).eval()
    randomise(model)
    x = torch.randn(2, 5, 8)
    output = model(x)
    output.sum(dim=1).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert_near(model(x), output.detach(), factor=10)  # torch's fast path
        with model.disable_adapter():
            assert_near(model(x), base(make).eval()(x), factor=10)
        model.save_pretrained(tmp_path)
        assert_near(PeftModel.from_pretrained(base(make), tmp_path).eval()(x), output.detach(), factor=10)
        model.add_adapter("second", LoomConfig(r=3, target_modules=targets))
        model.set_adapter("second")
        assert_near(model(x), base(make).eval()(x), factor=10)
        model.set_adapter("default")
        merged = model.merge_and_unload()
        assert_near(merged(x), output.detach(), factor=10)
        assert merged.state_dict().keys() == base(make).state_dict().keys()


@torch.no_grad()
def test_both_projections_have_their_update():
    model = get_peft_model(base(), LoomConfig(r=2, lora_alpha=6, target_modules=["attention"])).eval()
    randomise(model)
    dense, x = base().eval(), torch.randn(2, 5, 8)
    for weight, place in (
        (dense.attention.in_proj_weight, ""),
        (dense.attention.out_proj.weight, "base_layer.out_proj."),
    ):
        A, B = (model.get_parameter(f"base_model.model.attention.{place}loom_lora_{n}.default.weight") for n in "AB")
        weight += 3 * B @ A
    assert_near(model(x), dense(x), factor=10)


def test_widths_that_differ_are_refused():
    with pytest.raises(InputError) as raised:
        get_peft_model(Attends(kdim=8, vdim=4), LoomConfig(r=2, target_modules=["attention"]))
    assert raised.value.code == "attention-widths"


def test_dropout_is_refused():
    with pytest.raises(InputError) as raised:
        get_peft_model(base(), LoomConfig(target_modules=["attention"], lora_dropout=0.1))
    assert raised.value.code == "parameter-option"
