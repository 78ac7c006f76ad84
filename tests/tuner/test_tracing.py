"""Export, tracing, function transforms, shapes without numbers: what runs on PEFT's layers runs on ours, and equal."""

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from loraloom import LoomConfig
from tests.tuner.support import ALL_PARTS, Pair, assert_near, randomise

PARTS = {"lora": {}, "dora": {"use_dora": True}, "all": ALL_PARTS, "dropout": {"lora_dropout": 0.5}}
TOKENS = 300  # more than the nodes by hand begin at


@pytest.fixture(params=PARTS)
def parts(request):
    return PARTS[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def adapted(parts, dtype=torch.float32):
    torch.manual_seed(0)
    model = get_peft_model(Pair().to(dtype), LoomConfig(r=4, target_modules=["first", "second"], **parts)).eval()
    randomise(model)
    return model.get_base_model()


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def tokens(dtype=torch.float32):
    return torch.randn(TOKENS, 8).to(dtype)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes become constants
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@torch.no_grad()
def test_export_and_trace(parts, dtype):
    model, x = adapted(parts, dtype), tokens(dtype)
    assert_near(torch.export.export(model, (x,)).module()(x), model(x))
    assert_near(torch.jit.trace(model, x)(x), model(x))


def test_gradients_of_a_function_are_autograds(parts, dtype):
    model, x = adapted(parts, dtype), tokens(dtype)
    model(x).float().square().mean().backward()
    gradients = grad(lambda p: functional_call(model, p, (x,)).float().square().mean())(trainable(model))
    for name, gradient in gradients.items():
        assert_near(gradient, model.get_parameter(name).grad, dtype, factor=10)


def test_gradients_per_sample_add_up(parts):
    model, x = adapted(parts), tokens()
    model(x).square().sum().backward()
    one = grad(lambda p, row: functional_call(model, p, (row[None],)).square().sum())
    for name, gradients in vmap(one, in_dims=(None, 0))(trainable(model), x).items():
        assert_near(gradients.sum(0), model.get_parameter(name).grad, factor=100)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@torch.no_grad()
def test_forward_over_adapters_and_along_a_direction(parts):
    model, x = adapted(parts), tokens()
    many = {name: torch.stack([p, 0.9 * p]) for name, p in trainable(model).items()}
    outputs = vmap(lambda p: functional_call(model, p, (x,)))(many)
    for i, output in enumerate(outputs):
        assert_near(output, functional_call(model, {name: p[i] for name, p in many.items()}, (x,)), factor=10)
    tangent, step = torch.randn_like(x), 1e-3
    _, slope = jvp(lambda x: model(x), (x,), (tangent,))
    measured = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    assert (slope - measured).abs().max() < 1e-2 * measured.abs().max()


@torch.no_grad()
def test_forward_mode_differentiation_without_torch_func(parts):
    """The nodes by hand know gradients alone."""
    model, x = adapted(parts), tokens()
    tangent, step = torch.randn_like(x), 1e-3
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    measured = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    assert (slope - measured).abs().max() < 1e-2 * measured.abs().max()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_shapes_without_numbers(parts, dtype, train):
    model = adapted(parts, dtype).train(train)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = model(tokens(dtype))
    assert (output.shape, output.dtype) == ((TOKENS, 8), dtype)
    output = adapted(parts, dtype).train(train).to("meta")(tokens(dtype).to("meta"))
    assert (output.shape, output.dtype) == ((TOKENS, 8), dtype)
