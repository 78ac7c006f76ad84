"""PEFT's LoRA and DoRA as the reference: same weights -> same outputs, same gradients, same loss curves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from loraloom import LoomConfig
from tests.tuner.support import (
    Pair,
    Toy,
    assert_near,
    make_base,
    make_input,
    pair_with_peft,
    peft_names,
    randomise,
)

VARIANTS = [
    {"use_dora": dora, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas}
    for dora in (False, True)
    for rslora, ranks, alphas in ((False, {}, {}), (True, {}, {}), (False, {"target": 3}, {"target": 7}))
]


def lora_config(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["target"]} | kwargs)


def assert_same_function_and_gradients(theirs, ours, x, dtype=None):
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    outputs = [model(value) for model, value in zip((theirs, ours), inputs, strict=True)]
    assert outputs[1].dtype == outputs[0].dtype
    assert_near(outputs[1], outputs[0], dtype)
    weight = torch.randn_like(outputs[0].float())
    for output in outputs:
        (output.float() * weight).sum().backward()
    if x.is_floating_point():
        assert_near(inputs[1].grad, inputs[0].grad, dtype)
    own = dict(ours.named_parameters())
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            gradient = own[peft_names(name)].grad
            assert gradient.dtype == own[peft_names(name)].dtype
            assert_near(gradient.reshape(parameter.shape), parameter.grad, dtype)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv2d", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(k for k, on in v.items() if on) or "lora")
def test_from_lora_has_pefts_outputs_and_gradients(kind, variant):
    theirs, ours = pair_with_peft(lambda: make_base(kind), lora_config(**variant, fan_in_fan_out=kind == "conv1d"))
    assert_same_function_and_gradients(theirs.train(), ours.train(), make_input(kind))


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_second_derivatives_are_pefts(dora, kind):
    """On more tokens than the nodes by hand begin at, and on a 4-bit weight in training."""
    pair = pair_with_peft(lambda: make_base(kind), lora_config(use_dora=dora))
    x = make_input(kind).repeat(1, 40, 1)
    found = []
    for model in pair:
        inputs = [x.clone().requires_grad_(), *(p for p in model.train().parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(model(inputs[0]).square().mean(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    theirs, ours = found
    assert len(ours) == (4 if dora else 3)
    for expected, value in zip(theirs, ours, strict=True):
        assert_near(value, expected, factor=10)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bf16_base_with_float32_adapters_is_as_near_to_exact_as_peft(dora):
    """PEFT rounds elsewhere, so both are held against float64: ours at most twice theirs and one bf16 rounding."""

    def errors(dtype):
        theirs, ours = pair_with_peft(lambda: make_base("linear", dtype), lora_config(use_dora=dora))
        x = make_input("linear", torch.bfloat16).to(dtype)
        grads = []
        for model in (theirs, ours):
            output = model(x)
            (output.float().sin()).sum().backward()
            grads.append([output] + [p.grad for p in model.parameters() if p.requires_grad])
        return grads

    def exact():
        base = make_base("linear", torch.bfloat16).to(torch.float64)
        model = get_peft_model(base, lora_config(use_dora=dora)).to(torch.float64)
        source, _ = pair_with_peft(lambda: make_base("linear", torch.bfloat16), lora_config(use_dora=dora))
        model.load_state_dict(source.state_dict())
        output = model(make_input("linear", torch.bfloat16).double())
        output.sin().sum().backward()
        return [output] + [p.grad for p in model.parameters() if p.requires_grad]

    theirs, ours = errors(torch.bfloat16)
    for ours_value, theirs_value, value in zip(ours, theirs, exact(), strict=True):
        own = (ours_value.reshape(value.shape).double() - value).norm() / value.norm()
        peer = (theirs_value.double() - value).norm() / value.norm()
        assert own <= 2 * peer + 2**-8


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_gives_pefts_dtype_and_values(dora, dtype):
    theirs, ours = pair_with_peft(lambda: make_base("linear", dtype), lora_config(use_dora=dora))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_function_and_gradients(theirs, ours, make_input("linear", dtype), torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    rank=st.integers(1, 12),
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
    dora=st.booleans(),
)
def test_any_shape_and_rank(inputs, outputs, rank, batch, bias, dora):
    """In float64, for some of these small sums cancel, and their float32 rounding has no bound relative to the result.

    The tolerance is float32's, because our magnitude is stored in it.
    """

    def base():
        torch.manual_seed(0)
        return Toy(nn.Linear(inputs, outputs, bias=bias)).double()

    theirs, ours = pair_with_peft(base, lora_config(r=rank, use_dora=dora))
    x = torch.randn(*batch, inputs, dtype=torch.float64)
    assert_same_function_and_gradients(theirs, ours, x, torch.float32)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 4),
    outputs=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dora=st.booleans(),
)
def test_any_convolution(channels, outputs, kernel, stride, padding, dora):
    def base():
        torch.manual_seed(0)
        return Toy(nn.Conv2d(channels, outputs, kernel, stride=stride, padding=padding))

    theirs, ours = pair_with_peft(base, lora_config(r=2, use_dora=dora))
    assert_same_function_and_gradients(theirs, ours, torch.randn(2, channels, 5, 4), torch.float32)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_input_without_a_batch_dimension_is_a_batch_of_one(dora):
    _, ours = pair_with_peft(lambda: make_base("linear"), lora_config(use_dora=dora))
    x = torch.randn(6)
    assert_near(ours(x), ours(x[None])[0])


def test_an_empty_batch_goes_through_forward_and_backward():
    theirs, ours = pair_with_peft(lambda: make_base("linear"), lora_config(use_dora=True))
    output = ours(torch.zeros(0, 6))
    output.sum().backward()
    assert output.shape == theirs(torch.zeros(0, 6)).shape
    assert all(p.grad.abs().sum() == 0 for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_factors_in_bf16_do_not_round_the_base_path(dora):
    """TRL casts the factors on a quantised base to bf16, whatever the base computes in. At B = 0 nothing may change."""
    model = get_peft_model(make_base("linear"), LoomConfig(r=4, target_modules=["target"], use_dora=dora))
    for name, parameter in model.named_parameters():
        if ".loom_lora_A" in name or ".loom_lora_B" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    x, base = make_input("linear").requires_grad_(), make_base("linear").target
    output, weight = model(x), torch.randn(2, 5, 10)
    (output * weight).sum().backward()
    assert output.dtype == torch.float32
    assert_near(output, base(x))
    assert_near(x.grad, weight @ base.weight)
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    if dora:
        magnitude = next(p for n, p in model.named_parameters() if "magnitude" in n)
        assert_near(magnitude.grad, ((output - base.bias) * weight).sum((0, 1)) / magnitude)


def loss_curve(model, steps=50, **optimizer):
    """Losses of AdamW on a fixed regression, two micro-batches a step."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(steps, 2, 12, 8, generator=generator), torch.randn(steps, 2, 12, 8, generator=generator)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **optimizer)
    losses = []
    for step in range(steps):
        for micro in range(2):
            loss = F.mse_loss(model(x[step, micro]), y[step, micro])
            loss.backward()
            losses.append(loss.item())
        adam.step()
        adam.zero_grad()
    return torch.tensor(losses)


@pytest.mark.parametrize("optimizer", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fifty_steps_of_adamw_follow_pefts_losses(dora, optimizer):
    def base():
        torch.manual_seed(0)
        return Pair()

    theirs, ours = pair_with_peft(base, lora_config(target_modules=["first", "second"], use_dora=dora))
    expected = loss_curve(theirs, **optimizer)
    assert expected[-1] < 0.99 * expected[0]
    torch.testing.assert_close(loss_curve(ours, **optimizer), expected, rtol=1e-5, atol=1e-5)


def test_a_mixer_fixed_at_the_identity_and_a_gate_at_one_are_peft_lora():
    theirs = get_peft_model(make_base("linear"), lora_config())
    randomise(theirs, 3)
    config = LoomConfig.from_lora(lora_config(), use_mixer="orthogonal", use_gate=True)
    ours = get_peft_model(make_base("linear"), config)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                own[peft_names(name)].copy_(parameter)
        mixer = next(p for n, p in own.items() if ".loom_mixer." in n)
        mixer.copy_(torch.eye(4))
    assert_same_function_and_gradients(theirs, ours, make_input("linear"))


def test_from_lora_refuses_what_it_cannot_express_by_name():
    with pytest.raises(ValueError, match="lora_bias"):
        LoomConfig.from_lora(lora_config(lora_bias=True))
    with pytest.raises(ValueError, match="loftq"):
        LoomConfig.from_lora(lora_config(init_lora_weights="loftq"))
