"""A cached norm must never be stale: after any change of the weights, by any route, the output is the formula's.

Each test asks for the output first, so that a norm is cached, changes something, and compares with the dense formula
in float64, which caches nothing.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from loraloom import LoomConfig
from loraloom.tuner import row_norm
from loraloom.update.terms import Term
from tests.tuner.support import (
    ALL_PARTS,
    ALPHA,
    Dense,
    Pair,
    R,
    adapted,
    adapter_tensors,
    assert_near,
    make_base,
    make_input,
    pair_with_peft,
    randomise,
)

PARTS = ALL_PARTS | {"use_rslora": False}


def assert_formula(model, kind="linear", dtype=torch.float32, adapter="default"):
    layer = model.get_base_model().target.get_base_layer()
    dense = Dense.of(kind, layer)
    x = make_input(kind, torch.float32 if kind == "nf4" else layer.weight.dtype)
    expected = dense(x, dense.adapted_weight(adapter_tensors(model, adapter), PARTS))
    with torch.no_grad():
        assert_near(model(x), expected, dtype)


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_step(model, optimizer):
    model(make_input("linear")).square().sum().backward()
    optimizer.step()


def step_with(cls, **kwargs):
    return lambda model: optimizer_step(model, cls(parameters(model), lr=0.1, **kwargs))


def reload_state_dict(model):
    state = {k: v + 0.1 if ".loom_" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def reload_peft_state_dict(model):
    state = {k: v + 0.1 for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)


def edit_in_place(model):
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(0.1)


def edit_data(model):
    for parameter in parameters(model):
        parameter.data.add_(0.1)


def edit_one_entry_of_data(model):
    next(p for n, p in model.named_parameters() if "loom_lora_A" in n).data.view(-1)[5] += 3.0


def edit_mixer_data(model):
    next(p for n, p in model.named_parameters() if "loom_mixer" in n).data.mul_(-2.0)


def edit_gate_data(model):
    next(p for n, p in model.named_parameters() if "loom_gate" in n).data.mul_(-2.0)


def replace_data(model):
    for parameter in parameters(model):
        parameter.data = parameter.data.clone() + 0.1


def replace_parameters(model):
    """What PEFT does when it casts, and FSDP when it shards: new Parameter objects under the old names."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.detach() + 0.1))


def edit_through_numpy(model):
    next(p for n, p in model.named_parameters() if "loom_lora_B" in n).detach().numpy()[0] += 1.0


def swap_tensors(model):
    """How torch exchanges a parameter's content while its identity stays (`Module.to` with swapping on)."""
    for parameter in parameters(model):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach() + 0.1))


def edit_base_in_place(model):
    with torch.no_grad():
        model.get_base_model().target.get_base_layer().weight.mul_(1.5)


def edit_base_data(model):
    model.get_base_model().target.get_base_layer().weight.data.mul_(1.5)


def replace_base(model):
    layer = model.get_base_model().target.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


ROUTES = [
    step_with(torch.optim.AdamW, foreach=False),
    step_with(torch.optim.AdamW, foreach=True),
    step_with(torch.optim.AdamW, fused=True),
    step_with(torch.optim.SGD),
    reload_state_dict,
    reload_peft_state_dict,
    edit_in_place,
    edit_data,
    edit_one_entry_of_data,
    edit_mixer_data,
    edit_gate_data,
    replace_data,
    replace_parameters,
    edit_through_numpy,
    swap_tensors,
    edit_base_in_place,
    edit_base_data,
    replace_base,
]
NAMES = ["adamw", "adamw-foreach", "adamw-fused", "sgd", *(route.__name__ for route in ROUTES[4:])]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
def test_no_route_leaves_a_stale_norm(route, mode):
    model = adapted(PARTS, "linear").train(mode == "train")
    assert_formula(model)
    before = model(make_input("linear")).detach()
    route(model)
    assert (model(make_input("linear")) - before).abs().max() > 1e-3
    assert_formula(model)


@pytest.mark.parametrize("kind", ["embedding", "conv2d", "conv1d", "nf4"])
@pytest.mark.parametrize("route", [edit_in_place, edit_data, reload_peft_state_dict])
def test_other_layers_have_no_stale_norm_either(route, kind):
    model = adapted(PARTS, kind).train()
    assert_formula(model, kind)
    route(model)
    assert_formula(model, kind)


def test_merging_another_adapter_into_the_base_changes_the_norm():
    model = adapted(PARTS, "linear")
    model.add_adapter("other", LoomConfig(r=2, target_modules=["target"]))
    randomise(model, 5)
    assert_formula(model)
    model.base_model.merge_adapter(["other"])
    model.base_model.unmerge_adapter()
    assert_formula(model)


def test_an_edit_of_one_column_of_the_base_through_data_is_seen():
    """Version counters miss it, and the fingerprint of a large weight holds some of its entries only."""
    model = get_peft_model(Pair(256), LoomConfig(target_modules=["first"], use_dora=True))
    layer = model.get_base_model().first
    layer.row_norm("default")
    layer.base_layer.weight.data[:, 5] *= 3.0
    assert_near(layer.row_norm("default"), layer.base_layer.weight.detach().norm(dim=1))


def test_training_goes_on_from_a_norm_that_inference_mode_cached():
    model = adapted(PARTS, "linear")
    with torch.inference_mode():
        model(make_input("linear"))
    model.train()(make_input("linear")).sum().backward()
    assert all(p.grad is not None for p in parameters(model))
    assert_formula(model)


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        assert_formula(adapted(PARTS, "linear"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_the_model_changes_the_norm(dtype):
    model = adapted(PARTS, "linear")
    assert_formula(model)
    model.to(dtype)
    edit_data(model)
    assert_formula(model, dtype=dtype)
    model.to(torch.float32)
    assert_formula(model)


def test_a_copy_has_a_norm_of_its_own():
    model = adapted(PARTS, "linear")
    assert_formula(model)
    other = copy.deepcopy(model)
    edit_data(other)
    assert_formula(other)
    assert_formula(model)


def test_loading_a_second_checkpoint_into_the_same_name(tmp_path):
    source = adapted(PARTS, "linear")
    source.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_base("linear"), tmp_path).eval()
    assert_formula(model)
    state = load_file(tmp_path / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {k: v * 0.5 for k, v in state.items()})
    assert_formula(model)


def test_an_edit_between_forward_and_backward_is_seen_by_the_next_forward():
    model = adapted(PARTS, "linear").train()
    output = model(make_input("linear"))
    edit_in_place(model)
    assert_formula(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradient_accumulation_is_the_sum_over_micro_batches():
    model = adapted(PARTS, "linear").train()
    x = torch.randn(6, 6)
    model(x).square().sum().backward()
    whole = [p.grad.clone() for p in parameters(model)]
    model.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    for parameter, expected in zip(parameters(model), whole, strict=True):
        assert_near(parameter.grad, expected)


def test_the_norm_is_a_constant_in_backward():
    """Section 4.3 of the DoRA paper: the gradient of A is that of m / norm (W + D) with the norm held fixed."""
    model = adapted({"use_dora": True, "use_rslora": False}, "linear").train()
    x, weight = make_input("linear"), torch.randn(2, 5, 10)
    (model(x) * weight).sum().backward()
    dense = Dense.of("linear", model.get_base_model().target.get_base_layer())
    t = {k: v.requires_grad_() for k, v in adapter_tensors(model).items()}
    W = dense.weight + (ALPHA / R) * t["B"] @ t["A"]
    output = dense(x, t["m"].reshape(-1, 1) * W / W.norm(dim=1, keepdim=True).detach())
    (output * weight).sum().backward()
    named = dict(model.named_parameters())
    for part, attribute in {"A": "loom_lora_A", "B": "loom_lora_B", "m": "loom_lora_magnitude_vector"}.items():
        assert_near(named[f"base_model.model.target.{attribute}.default.weight"].grad, t[part].grad)


def test_a_row_that_cancels_stays_finite():
    """W + D = 0 in one row: the norm there is 0 up to rounding, and nothing may become inf or nan."""
    base = make_base("linear")
    model = get_peft_model(base, LoomConfig(r=6, lora_alpha=6, target_modules=["target"], use_dora=True))
    named = dict(model.named_parameters())
    with torch.no_grad():
        named["base_model.model.target.loom_lora_A.default.weight"].copy_(torch.eye(6))
        weight = model.get_base_model().target.get_base_layer().weight
        named["base_model.model.target.loom_lora_B.default.weight"][0] = -weight[0]
    output = model(torch.randn(4, 6))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in parameters(model))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_dropout_eval_is_the_merged_layer(dropout):
    model = adapted(PARTS, "linear", lora_dropout=dropout)
    assert_formula(model)
    with torch.no_grad():
        expected = model(make_input("linear"))
        model.merge_adapter()
        assert_near(model(make_input("linear")), expected)


def test_dropout_acts_on_the_low_rank_path_only():
    """With all of x dropped there, DoRA still applies to the base path: y = m / norm (W x) + bias."""
    model = adapted(PARTS, "linear", lora_dropout=0.5).train()
    dense = Dense.of("linear", model.get_base_model().target.get_base_layer())
    x = torch.zeros(1, 6)
    x[0, 2] = 1.0  # one entry: it is either kept (doubled) or dropped
    t = adapter_tensors(model)
    W = dense.adapted_weight({k: v for k, v in t.items() if k != "m"}, PARTS)
    c = t["m"] / W.norm(dim=1)
    kept = c * (2 * W - dense.weight)[:, 2] + dense.bias
    dropped = c * dense.weight[:, 2] + dense.bias
    seen = {"kept": 0, "dropped": 0}
    for _ in range(32):
        with torch.no_grad():
            y = model(x)[0].double()
        which = "kept" if (y - kept).norm() < (y - dropped).norm() else "dropped"
        assert_near(y, {"kept": kept, "dropped": dropped}[which], torch.float32)
        seen[which] += 1
    assert min(seen.values()) >= 4


def test_two_models_that_share_a_base_layer_keep_separate_norms():
    base = Pair()
    one = get_peft_model(copy.deepcopy(base), LoomConfig(r=2, target_modules=["first"], use_dora=True))
    two = get_peft_model(base, LoomConfig(r=2, target_modules=["first"], use_dora=True))
    randomise(one, 1)
    randomise(two, 2)
    x = torch.randn(3, 8)
    expected = one(x).detach()
    two(x)
    assert torch.equal(one(x).detach(), expected)


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm, orthogonal], ids=lambda f: f.__name__)
def test_a_parametrized_weight_which_is_another_tensor_at_each_access(parametrize):
    """Its address says nothing of its content: the allocator gives the same one again."""
    torch.manual_seed(0)
    base = make_base("linear")
    base.target.double()
    parametrize(base.target)
    model = get_peft_model(base, LoomConfig(r=R, lora_alpha=ALPHA, use_dora=True, target_modules=["target"])).eval()
    randomise(model)
    layer, x = model.get_base_model().target, make_input("linear").double()
    parts = {"use_rslora": False}
    with torch.no_grad():
        model(x)
        for entry in range(20):
            originals = [p for n, p in layer.base_layer.named_parameters() if "parametrizations" in n]
            originals[-1].view(-1)[entry] += 0.5
            W = layer.base_layer.weight.detach()
            dense = Dense("linear", W.double(), layer.base_layer.bias.double())
            assert_near(model(x), dense(x, dense.adapted_weight(adapter_tensors(model), parts)), torch.float32)


def test_on_an_accelerator_the_squared_norm_of_the_base_is_kept_by_address_and_version(monkeypatch):
    """The meta device stands for one: what waits for its values is an error."""
    calls = []
    squared_row_norm = row_norm.squared_row_norm
    monkeypatch.setattr(row_norm, "squared_row_norm", lambda W: calls.append(1) or squared_row_norm(W))
    W, term = torch.empty(10, 6, device="meta"), Term(*(torch.empty(*s, device="meta") for s in ((4, 6), (10, 4))))
    cache = row_norm.RowNormCache()
    for change, expected in ((lambda: None, 1), (lambda: None, 1), (lambda: W.add_(1), 2), (cache.clear, 3)):
        change()
        assert cache(W, lambda: W, [term]).shape == (10,)
        assert len(calls) == expected


@pytest.mark.parametrize("m", [None, 2.0], ids=["as it starts", "set"])
def test_a_row_of_zeros_stays_zero_in_every_way_of_use_where_pefts_is_nan(m):
    """A pruned base row; B does not reach it either."""

    def pruned():
        base = make_base("linear")
        with torch.no_grad():
            base.target.weight[3] = 0
        return base

    theirs, model = pair_with_peft(pruned, LoraConfig(r=R, target_modules=["target"], use_dora=True))
    layer = model.get_base_model().target
    with torch.no_grad():
        for lora in (theirs, model):
            for name, parameter in lora.named_parameters():
                if "lora_B" in name:
                    parameter[3] = 0
                elif "magnitude" in name:
                    parameter.view(-1)[3] = 0.0 if m is None else m
        x, bias = make_input("linear"), layer.get_base_layer().bias
        assert theirs(x)[..., 3].isnan().all()
        assert (model(x)[..., 3] == bias[3]).all()
        others = [i for i in range(10) if i != 3]
        assert_near(model(x)[..., others], theirs(x)[..., others])
        assert (layer.update("default").adapted_weight(layer.base_matrix())[3] == 0).all()
        assert (layer.get_delta_weight("default")[3] == 0).all()
        model.merge_adapter(safe_merge=True)
        assert (layer.get_base_layer().weight[3] == 0).all()
