"""torch.compile and gradient checkpointing give the numbers of the plain run."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loraloom import LoomConfig
from tests.tuner.support import (
    ALL_PARTS,
    PART_IDS,
    PARTS,
    Pair,
    adapted,
    assert_near,
    make_input,
    randomise,
)


def gradients(model, run, x):
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    output = run(x)
    output.float().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [output.detach(), *([x.grad] if x.is_floating_point() else []), *grads]


def assert_same(actual, expected, **kwargs):
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, **kwargs)


@pytest.mark.parametrize("parts", [PARTS[0], PARTS[4], PARTS[13], PARTS[15]], ids=[PART_IDS[i] for i in (0, 4, 13, 15)])
def test_compile_fullgraph_gives_the_same_output_and_gradients(parts):
    torch.compiler.reset()
    model, x = adapted(parts, "linear").train(), make_input("linear")
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    expected = gradients(model, model, x)
    assert_same(gradients(model, compiled, x), expected, factor=3)


@pytest.mark.parametrize("kind", ["embedding", "conv2d", "conv1d"])
def test_compile_fullgraph_on_other_layers(kind):
    torch.compiler.reset()
    model, x = adapted(ALL_PARTS, kind).train(), make_input(kind)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, compiled, x), gradients(model, model, x), factor=3)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=["fp32 factors", "bf16 factors"])
def test_compile_with_mixed_dtypes(base, factors):
    torch.compiler.reset()
    model, x = adapted(ALL_PARTS, "linear", base).train(), make_input("linear", base)
    for name, parameter in model.named_parameters():
        if ".loom_" in name and "magnitude_vector" not in name:
            parameter.data = parameter.data.to(factors)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    lowest = torch.float32 if base == factors == torch.float32 else torch.bfloat16
    assert_same(gradients(model, compiled, x), gradients(model, model, x), dtype=lowest, factor=2)


def test_a_compiled_model_sees_an_optimizer_step():
    """A norm baked into the graph as a constant would be stale after the first step."""
    torch.compiler.reset()
    model, x = adapted(ALL_PARTS, "linear").train(), make_input("linear")
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    gradients(model, compiled, x)
    for route in (lambda p: p.add_(0.2), lambda p: p.data.add_(0.2)):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    route(parameter)
        assert_same(gradients(model, compiled, x), gradients(model, model, x), factor=3)


def test_compile_with_several_active_adapters():
    torch.compiler.reset()
    model, x = adapted(ALL_PARTS, "linear"), make_input("linear")
    model.add_adapter("plain", LoomConfig(r=2, target_modules=["target"]))
    model.base_model.set_adapter(["default", "plain"])
    randomise(model)
    model.train()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, compiled, x), gradients(model, model, x), factor=3)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("parts", [PARTS[0], PARTS[15]], ids=[PART_IDS[i] for i in (0, 15)])
def test_checkpointing_gives_the_same_gradients_dropout_included(parts, dropout, use_reentrant):
    model, x = adapted(parts, "linear", lora_dropout=dropout).train(), make_input("linear")
    torch.manual_seed(3)
    expected = gradients(model, model, x)
    torch.manual_seed(3)
    actual = gradients(model, lambda v: checkpoint(model, v, use_reentrant=use_reentrant), x)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_checkpointing_under_autocast():
    model, x = adapted(ALL_PARTS, "linear", lora_dropout=0.3).train(), make_input("linear")

    def run(function):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, function, x)

    for a, e in zip(run(lambda v: checkpoint(model, v, use_reentrant=False)), run(model), strict=True):
        assert torch.equal(a, e)


def test_gradients_flow_to_layers_below_an_adapter():
    from peft import get_peft_model

    model = get_peft_model(Pair(), LoomConfig(target_modules=["first", "second"], **ALL_PARTS))
    randomise(model)
    model(torch.randn(3, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".first.loom_" in n)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
def test_the_output_can_be_changed_in_place(dora, dropout):
    """As nn.ReLU(inplace=True) after a linear layer does."""
    model, x = (
        adapted({"use_dora": dora, "use_rslora": False}, "linear", lora_dropout=dropout).train(),
        torch.randn(2, 5, 6),
    )
    grads = []
    for relu in (torch.relu, torch.relu_):
        torch.manual_seed(0)
        model.zero_grad()
        relu(model(x)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for gradient, changed in zip(*grads, strict=True):  # DoRA's z is computed again where y has been changed
        assert_near(changed, gradient)
