"""Adapters on the stacked experts of mixtures, against PEFT's target_parameters and against the dense formula."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loraloom import LoomConfig
from loraloom.errors import InputError
from loraloom.update.adapted_stack import AdaptedStack
from tests.architectures.table import ROWS
from tests.architectures.walk import outputs, weighted_sum
from tests.tuner.support import assert_near, randomise

MIXTURES = ("mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
# How transformers multiplies: a loop over experts, a batched and a grouped matmul.
WAYS = ("eager", "batched_mm", "grouped_mm")
R, ALPHA = 3, 5


def mixture(name, way="grouped_mm"):
    model = ROWS[name].build()
    model.config._experts_implementation = way
    return model


def config(**kwargs):
    return LoomConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": [], "target_parameters": TARGETS} | kwargs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MIXTURES)
def test_forward_gradients_and_merged_weights_are_pefts(name, way):
    theirs = get_peft_model(
        mixture(name, way), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=TARGETS)
    ).eval()
    ours = get_peft_model(mixture(name, way), config()).eval()
    randomise(theirs)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        pairs = {n: own[n.replace(".lora_", ".loom_lora_")] for n, p in theirs.named_parameters() if ".lora_" in n}
        for n, parameter in pairs.items():
            parameter.copy_(theirs.get_parameter(n))
    y, expected = outputs(ours, ROWS[name]), outputs(theirs, ROWS[name])
    assert_near(y.detach(), expected.detach())
    weighted_sum(y).backward()
    weighted_sum(expected).backward()
    for n, parameter in pairs.items():
        assert parameter.grad.abs().sum() > 0
        assert_near(parameter.grad, theirs.get_parameter(n).grad)
    merged, reference = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == reference.keys()
    for n, value in merged.items():
        assert_near(value, reference[n])


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_mixers_gates_and_several_adapters_merge_and_load(name, tmp_path):
    row = ROWS[name]
    base = outputs(mixture(name), row)
    model = get_peft_model(mixture(name), config(use_mixer="orthogonal", use_gate=True)).eval()
    model.add_adapter("second", config(r=2, use_gate=True))
    randomise(model)
    single = outputs(model, row)
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model, row)
    assert min((single - base).abs().max(), (both - single).abs().max()) > 1e-2
    with model.disable_adapter():
        assert torch.equal(outputs(model, row), base)
    model.merge_adapter()
    assert_near(outputs(model, row), both, factor=10)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, row), both)
    model.base_model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert torch.equal(outputs(PeftModel.from_pretrained(mixture(name), tmp_path).eval(), row), single)
    fresh = mixture(name)
    fresh.load_adapter(tmp_path)
    assert torch.equal(outputs(fresh.eval(), row), single)


def test_the_update_of_all_experts_is_never_formed():
    """The largest tensor that autograd saves is the frozen base or smaller than one expert's matrix."""
    model = get_peft_model(mixture("mixtral", "eager"), config())
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    saved = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in frozen:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs(model, ROWS["mixtral"])
    assert max(saved) < 4 * 96 * 32


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ({"use_dora": True}, "parameter-option"),
        ({"init_lora_weights": "pissa"}, "parameter-option"),
        ({"target_parameters": ["norm.weight"]}, "parameter-shape"),
    ],
)
def test_what_is_refused(option, code):
    with pytest.raises(InputError) as raised:
        get_peft_model(mixture("mixtral"), config(**option))
    assert raised.value.code == code


def test_a_parameter_that_does_not_exist():
    with pytest.raises(ValueError, match="gate_up_proj"):
        get_peft_model(mixture("mixtral"), config(target_parameters=["experts.gate_proj"]))


PRODUCTS = {
    "linear": lambda W, x: nn.functional.linear(x[0], W[1]),
    "matmul": lambda W, x: x[0] @ W[1].mT,
    "matmul from the left": lambda W, x: W[0] @ x[1].mT,
    "bmm": lambda W, x: torch.bmm(x, W.transpose(1, 2)),
    "chosen experts": lambda W, x: torch.bmm(W[torch.tensor([2, 0, 1])], x.mT),
    "something else": lambda W, x: (W * 2).sum(0) + W[:, 1].sum(),
    "a method": lambda W, x: W.sum(),
}


IN_LOW_RANK = [name for name in PRODUCTS if name not in ("something else", "a method")]


def stacks():
    return (torch.randn(shape).double() for shape in ((3, 5, 4), (3, 5, 2), (3, 2, 4), (3, 6, 4)))


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_stack_stands_for_its_sum(product):
    W, L, R, x = stacks()
    assert_near(product(AdaptedStack(W, L, R), x), product(W + L @ R, x))
    assert_near(product(AdaptedStack(AdaptedStack(W, L, R), -L, 2 * R), x), product(W - L @ R, x))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_stack_drops_the_input_of_its_low_rank_path(name, monkeypatch):
    W, L, R, x = stacks()
    product = PRODUCTS[name]
    if name not in IN_LOW_RANK:
        with pytest.raises(InputError) as raised:
            product(AdaptedStack(W, L, R, dropout=0.5), x)
        assert raised.value.code == "parameter-dropout"
        return
    # A dropout that can be written out: it gives three times what it gets.
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: x * p)
    assert_near(product(AdaptedStack(W, L, R, dropout=3.0), x), product(W + 3 * L @ R, x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MIXTURES)
def test_dropout_acts_in_training_alone(name, way):
    row = ROWS[name]
    model = get_peft_model(mixture(name, way), config(lora_dropout=0.5))
    model.add_adapter("second", config(r=2, lora_dropout=0.25))
    plain = get_peft_model(mixture(name, way), config())
    plain.add_adapter("second", config(r=2))
    for m in (model, plain):
        randomise(m)
        m.base_model.set_adapter(["default", "second"])
    expected = outputs(plain.eval(), row).detach()
    assert torch.equal(outputs(model.eval(), row).detach(), expected)
    y, other = outputs(model.train(), row), outputs(model, row)
    assert (y - expected).abs().max() > 1e-2
    assert not torch.equal(y, other)
    weighted_sum(y).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".loom_" in n)
