"""What must hold for every combination of parts, on every kind of layer, in float32 and bfloat16."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from loraloom import LoomConfig
from tests.tuner.support import (
    ALL_PARTS,
    ALPHA,
    FLOAT_KINDS,
    KINDS,
    PART_IDS,
    PARTS,
    Dense,
    R,
    adapted,
    adapter_tensors,
    assert_near,
    make_base,
    make_input,
    randomise,
    with_adapter,
)

every_combination = pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@every_dtype
@every_kind
@every_combination
def test_zero_init_is_the_identity(parts, kind, dtype):
    base, x = make_base(kind, dtype), make_input(kind, dtype)
    with torch.no_grad():
        expected = Dense.of(kind, base.target)(x)
        output = with_adapter(base, parts)(x)
    assert output.dtype == dtype
    assert_near(output, expected)


@every_dtype
@every_kind
@every_combination
def test_forward_is_the_formula(parts, kind, dtype):
    model, x = adapted(parts, kind, dtype), make_input(kind, dtype)
    tensors, dense = adapter_tensors(model), Dense.of(kind, make_base(kind, dtype).target)
    assert set(tensors) == {"A", "B"} | {part for part, name in zip("Mgm", parts, strict=False) if parts[name]}
    with torch.no_grad():
        output = model(x)
    assert output.dtype == dtype
    assert_near(output, dense(x, dense.adapted_weight(tensors, parts)))


@every_dtype
@pytest.mark.parametrize("kind", FLOAT_KINDS)
@every_combination
def test_merge_is_the_forward_and_unmerge_restores_every_bit(parts, kind, dtype):
    model, x = adapted(parts, kind, dtype), make_input(kind, dtype)
    layer = model.get_base_model().target.get_base_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        merged = model(x)
        assert not torch.equal(layer.weight, before["weight"])
        model.unmerge_adapter()
        restored = model(x)
    assert merged.dtype == dtype
    assert_near(merged, expected)
    assert torch.equal(restored, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@every_kind
@every_combination
def test_save_then_load_gives_the_same_output(parts, kind, tmp_path):
    model, x = adapted(parts, kind), make_input(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@every_combination
def test_merge_and_unload_leaves_a_plain_layer_with_the_same_output(parts, kind):
    model, x = adapted(parts, kind), make_input(kind)
    with torch.no_grad():
        expected = model(x)
        unloaded = model.merge_and_unload(safe_merge=True)
        assert type(unloaded.target) is type(make_base(kind).target)
        assert_near(unloaded(x), expected)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@every_combination
def test_delta_weight_is_what_the_merge_adds(parts, kind):
    model = adapted(parts, kind)
    layer = model.get_base_model().target
    before, delta = layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight("default")
    model.merge_adapter()
    assert delta.shape == before.shape
    assert_near(before + delta, layer.get_base_layer().weight.detach())


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("mixer", [False, "orthogonal", "kaiming"])
@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_every_init_starts_at_the_base_function_and_leaves_the_base_alone(init, mixer, dora, kind):
    base, x = make_base(kind), make_input(kind)
    before = base.target.weight.detach().clone()
    parts = {"init_lora_weights": init, "use_mixer": mixer, "use_dora": dora, "use_gate": True}
    model = with_adapter(base, parts)
    assert torch.equal(model.get_base_model().target.get_base_layer().weight, before)
    with torch.no_grad():
        assert_near(model(x), make_base(kind)(x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_the_base_weight_round_trip_and_merge(init, tmp_path):
    model, x = with_adapter(make_base("linear"), ALL_PARTS, init_lora_weights=init), make_input("linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "loom_lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(x)
        assert (expected - make_base("linear")(x)).abs().max() > 1e-2
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_base("linear"), tmp_path).eval()
        assert torch.equal(loaded(x), expected)
        model.merge_adapter()
        assert_near(model(x), expected)


def test_pissa_starts_from_the_leading_singular_triples_of_the_base():
    base = make_base("linear")
    W = Dense.of("linear", base.target).weight
    t = adapter_tensors(with_adapter(base, init_lora_weights="pissa"))
    U, S, V = torch.linalg.svd(W)
    assert_near((ALPHA / R) * t["B"] @ t["A"], U[:, :R] @ torch.diag(S[:R]) @ V[:R], torch.float32)


def test_olora_starts_from_the_leading_orthonormal_columns_of_the_base():
    base = make_base("linear")
    Q, _ = torch.linalg.qr(Dense.of("linear", base.target).weight)
    B = adapter_tensors(with_adapter(base, init_lora_weights="olora"))["B"]
    B = B / B.norm(dim=0)
    assert_near((B.T @ Q[:, :R]).abs(), torch.eye(R).double(), torch.float32)


@every_combination
def test_gates_and_magnitudes_are_float32_and_every_part_trains(parts):
    model = with_adapter(make_base("linear", torch.bfloat16), parts)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".loom_" in n}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if p.requires_grad)
    randomise(model)
    model(make_input("linear", torch.bfloat16)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@every_combination
def test_factors_in_bf16_on_a_bf16_base_forward_and_train(parts, kind):
    config = LoomConfig(r=R, lora_alpha=ALPHA, target_modules=["target"], **parts)
    model = get_peft_model(make_base(kind, torch.bfloat16), config, autocast_adapter_dtype=False).train()
    randomise(model)
    x, dense = make_input(kind, torch.bfloat16), Dense.of(kind, make_base(kind, torch.bfloat16).target)
    output = model(x)
    assert output.dtype == torch.bfloat16
    assert_near(output, dense(x, dense.adapted_weight(adapter_tensors(model), parts)), factor=2)
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_without_autocast_adapter_dtype_the_factors_follow_the_base_but_gate_and_magnitude_do_not():
    config = LoomConfig(target_modules=["target"], **ALL_PARTS)
    model = get_peft_model(make_base("linear", torch.bfloat16), config, autocast_adapter_dtype=False)
    dtypes = {n.split(".loom_")[1].split(".")[0]: p.dtype for n, p in model.named_parameters() if ".loom_" in n}
    assert dtypes["lora_A"] == dtypes["lora_B"] == dtypes["mixer"] == torch.bfloat16
    assert dtypes["gate_lora_magnitude_vector"] == dtypes["lora_magnitude_vector"] == torch.float32
