"""Autocast: any dtype of base and adapter beside any dtype of autocast, several adapters, DoRA's norm, the compiler."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from loraloom import LoomConfig
from tests.tuner.support import Toy, randomise

KINDS = {
    "linear": lambda: nn.Linear(8, 6),
    "conv2d": lambda: nn.Conv2d(8, 6, 1),
    "embedding": lambda: nn.Embedding(8, 6),
}
ADAPTERS = {
    "two of LoRA": [{}, {"r": 2}],
    "an anchor": [{"init_lora_weights": "pissa"}],
    "a gate and a mixer beside LoRA": [{"use_gate": True, "use_mixer": "orthogonal"}, {}],
    "two of DoRA": [{"use_dora": True}, {"use_dora": True, "r": 2}],
}
HALVES = (torch.float16, torch.bfloat16)


def adapted(kind, adapters, dtype, in_float32=False):
    """The model, and an input. ``in_float32``: the same numbers, computed in float32."""
    torch.manual_seed(0)
    model = None
    base = Toy(KINDS[kind]()).to(dtype)
    for i, parts in enumerate(adapters):
        config = LoomConfig(**{"r": 4, "target_modules": ["target"]} | parts)
        if model is None:
            model = get_peft_model(base, config, "0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=False)
    randomise(model)
    model.base_model.set_adapter([str(i) for i in range(len(adapters))])
    x = {"linear": torch.randn(400, 8), "conv2d": torch.randn(4, 8, 5, 5), "embedding": torch.arange(8)}[kind]
    x = x.to(dtype) if x.is_floating_point() else x
    if in_float32:
        model, x = model.float(), x.float() if x.is_floating_point() else x
    return model.eval(), x


@pytest.mark.parametrize("autocast", HALVES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_under_every_autocast(kind, adapters, dtype, autocast):
    exact, x = adapted(kind, adapters, dtype, in_float32=True)
    expected = exact(x)
    model, x = adapted(kind, adapters, dtype)
    with torch.autocast("cpu", autocast):
        y = model(x)
        assert y.dtype is model.get_base_model().target.base_layer(x).dtype
    # A sum of 8 products, each of two numbers rounded to 2^-9 of their size, and of two sums after it.
    assert (y.float() - expected).abs().max() < 2e-2 * expected.abs().max()
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_norm_is_not_rounded_by_autocast():
    model, x = adapted("linear", ADAPTERS["two of DoRA"], torch.float32)
    layer = model.get_base_model().target
    with torch.no_grad():
        expected = (layer.base_matrix() + layer.update("0").delta()).norm(dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
            norm = layer.row_norm("0")
    torch.testing.assert_close(norm, expected, rtol=3e-5, atol=0)  # the bound that update.py derives


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_compiled_under_autocast(adapters):
    model, x = adapted("linear", adapters, torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, y = model(x), compiled(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert (y - expected).abs().max() < 2e-2 * expected.abs().max()
