"""bitsandbytes bases on the CPU: NF4, nested NF4 and int8."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loraloom import LoomConfig
from tests.tuner.support import (
    ALL_PARTS,
    ALPHA,
    PART_IDS,
    PARTS,
    Dense,
    R,
    Toy,
    adapter_tensors,
    assert_near,
    nf4_linear,
    nf4_llama,
    peft_names,
    quantised_base,
    randomise,
)

IDS = torch.arange(10, 22).reshape(2, 6)
EVERY_BASE = ["nf4", "nested nf4", "int8"]


def quantised(kind, parts=ALL_PARTS, dtype=torch.float32):
    config = LoomConfig(r=R, lora_alpha=ALPHA, target_modules=["target"], **parts)
    model = get_peft_model(quantised_base(kind, dtype), config)
    randomise(model)
    return model


def data(dtype=torch.float32):
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def dequantised(kind, layer):
    if kind == "int8":
        statistics = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, statistics).double()
    return Dense.of("nf4", layer).weight


def frozen_bytes(model):
    layer = model.get_base_model().target.get_base_layer()
    return layer.weight.data.clone()


@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
@pytest.mark.parametrize("kind", EVERY_BASE)
def test_forward_and_backward_are_finite_and_every_part_trains(kind, parts):
    model, x = quantised(kind, parts).train(), data().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert x.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        if ".loom_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_int8_has_pefts_outputs_and_gradients(dora):
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["target"], use_dora=dora)
    theirs = get_peft_model(quantised_base("int8"), config)
    ours = get_peft_model(quantised_base("int8"), LoomConfig.from_lora(config))
    randomise(theirs)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                own[peft_names(name)].copy_(parameter)
    outputs = [model.train()(data()) for model in (theirs, ours)]
    for output in outputs:
        output.sin().sum().backward()
    assert_near(outputs[1], outputs[0])
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert_near(own[peft_names(name)].grad, parameter.grad)


@pytest.mark.parametrize("kind", EVERY_BASE)
def test_zero_init_is_the_identity(kind):
    base = quantised_base(kind).train()
    with torch.no_grad():
        expected = base(data())
        config = LoomConfig(r=R, target_modules=["target"], **ALL_PARTS)
        assert_near(get_peft_model(base, config).train()(data()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", EVERY_BASE)
def test_unmerge_restores_every_bit(kind, dtype):
    model, x = quantised(kind, dtype=dtype).eval(), data(dtype)
    with torch.no_grad():
        expected, before = model(x), frozen_bytes(model)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.merge_adapter()
        assert not torch.equal(frozen_bytes(model), before)
        model(x)
        model.unmerge_adapter()
        assert torch.equal(frozen_bytes(model), before)
        assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", EVERY_BASE)
def test_merging_costs_no_more_than_quantising_the_exact_result(kind):
    """Merging requantises, so it is not exact; its error is that of quantising W' once, and not more."""
    model = quantised(kind).eval()
    layer = model.get_base_model().target.get_base_layer()
    W, t = dequantised(kind, layer), adapter_tensors(model)
    exact = Dense("linear", W, None).adapted_weight(t, ALL_PARTS)
    model.merge_adapter()
    merged = dequantised(kind, model.get_base_model().target.get_base_layer())
    again = Toy(type(layer)(64, 32, **({"quant_type": "nf4"} if kind != "int8" else {"has_fp16_weights": False})))
    again.target.load_state_dict({"weight": exact.float(), "bias": torch.zeros(32)})
    best = dequantised(kind, again.to("cpu").target)
    assert (merged - exact).norm() <= 1.05 * (best - exact).norm()
    assert (merged - W).norm() > 0.5 * (exact - W).norm()


@pytest.mark.parametrize("kind", ["nf4", "nested nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_after_an_eval_forward_is_still_right(kind, dtype):
    """bitsandbytes 0.50 repacks 4-bit weights at the first eval forward on CPUs with AVX512-BF16, after which
    gradients through the layer are lost. Train, eval, train again must equal train, train."""

    def step(model):
        x = data(dtype).requires_grad_()
        model.train().zero_grad()
        output = model(x)
        output.float().square().sum().backward()
        return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    model = quantised(kind, dtype=dtype)
    expected, before = step(model), frozen_bytes(model)
    with torch.no_grad():
        evaluated = model.eval()(data(dtype))
    assert torch.equal(frozen_bytes(model), before)
    assert_near(evaluated, expected[0])
    for actual, value in zip(step(model), expected, strict=True):
        assert torch.equal(actual, value)


class Unadapted(nn.Module):
    """A quantised layer without an adapter above one with: gradients pass through both."""

    def __init__(self):
        super().__init__()
        self.target, self.head = nf4_linear(64, 64, torch.float32), nf4_linear(64, 32, torch.float32, seed=1)
        self.is_loaded_in_4bit = True

    def forward(self, x):
        return self.head(self.target(x))


def test_layers_without_an_adapter_do_not_lose_gradients_either():
    model = get_peft_model(Unadapted(), LoomConfig(r=R, target_modules=["target"]))
    randomise(model)
    with torch.no_grad():
        expected = model.train()(data())
        assert_near(model.eval()(data()), expected)
    model.train()(data()).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_a_base_that_was_repacked_already_is_refused():
    base = quantised_base("nf4").eval()
    with torch.no_grad():
        base(data())
    if not getattr(base.target.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    with pytest.raises(RuntimeError, match=r"target.*repacked"):
        get_peft_model(base, LoomConfig(r=R, target_modules=["target"]))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_llama_loaded_in_4_bit_trains_saves_and_loads(pico_llama_dir, tmp_path, nested):
    config = LoomConfig(r=4, target_modules="all-linear", **ALL_PARTS)
    model = get_peft_model(nf4_llama(pico_llama_dir, nested), config)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        with torch.no_grad():
            model.eval()(IDS)
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nf4_llama(pico_llama_dir, nested), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "magnitude_vector" in n)


def test_a_mixed_batch_on_a_4_bit_base():
    model = quantised("nf4").eval()
    model.add_adapter("plain", LoomConfig(r=2, target_modules=["target"]))
    randomise(model)
    with torch.no_grad():
        rows = []
        for name in ("default", "plain"):
            model.set_adapter(name)
            rows.append(model(data())[len(rows)])
        mixed = model(data(), adapter_names=["default", "plain", "__base__"])
        with model.disable_adapter():
            rows.append(model(data())[2])
    assert_near(mixed, torch.stack(rows))


@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_4_bit_base_in_the_node_has_the_outputs_and_gradients_of_one_beside_it(parts, bias, dropout):
    """A hook on the base layer makes it run beside the node."""

    def run(hook):
        model, x = quantised("nf4", parts).train(), data().requires_grad_()
        layer = model.get_base_model().target
        layer.dropout["default"] = dropout
        base = layer.get_base_layer()
        if not bias:
            base.bias = None
        if hook:
            base.register_forward_hook(lambda *_: None)
        torch.manual_seed(0)
        output = model(x)
        output.square().sum().backward()
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        return output.detach(), *(t.grad for t in trained)

    for value, expected in zip(run(False), run(True), strict=True):
        assert_near(value, expected)


def test_a_4_bit_base_is_dequantised_once_in_a_pass(monkeypatch):
    """Backward alone needs the weight as such, for the gradient of the input."""
    model, x = quantised("nf4", {}).train(), data().requires_grad_()
    layer, made = model.get_base_model().target, []
    monkeypatch.setattr(
        type(layer), "base_matrix", lambda self: made.append(1) or self.as_matrix(self.get_base_weight())
    )
    output = model(x)
    assert not made
    output.sum().backward()
    assert len(made) == 1
