"""Whole adapters on every layer kind: found, copied, merged and swept, with the dense formula as the reference."""

import io
import json
from functools import partial

import pytest
import torch
from rich.console import Console

from loraloom.adapter.live import LiveAdapter
from loraloom.intruders.live import (
    find_intruders,
    merge_with_reduced_intruders,
    reduce_intruders,
    sweep_intruders,
)
from loraloom.intruders.solvers.basis import BasisCache
from tests.intruders.live_models import EPSILON, MAKERS, OPTIONS, lora_adapted, same, state, weight_of
from tests.refusals import coded
from tests.tuner.support import (
    ALL_PARTS,
    FLOAT_KINDS,
    KINDS,
    PART_IDS,
    PARTS,
    Dense,
    Pair,
    adapted,
    adapter_tensors,
    assert_near,
    make_input,
)


def expected(model, scale, scope):
    """The base weight and the mitigated one, dense, in float64."""
    layer = next(iter(LiveAdapter(model, "default").modules.values()))
    W, changed = layer.weight().double(), layer.adapted_weight().double()
    U0, S0, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = torch.linalg.svd(changed, full_matrices=False)
    cosine = (U0[:, 1e-5 * S0[0] < S0].T @ U).abs().amax(0)[:4]
    found = (cosine < EPSILON).nonzero()[:, 0]
    assert len(found)
    found = found[:1] if scope == "top" else found
    return W, changed + (scale - 1) * (U[:, found] * S[found]) @ Vh[found]


@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_that_is_analysed_is_the_adapters(kind, parts):
    model = adapted(parts, kind)
    dense = Dense.of(kind, model.base_model.model.target.base_layer)
    reference = dense.adapted_weight(adapter_tensors(model), parts)
    assert_near(weight_of(model), reference, factor=5)


@pytest.mark.parametrize("kind", [*KINDS, "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_weight_that_is_analysed_is_that_of_pefts_layer(kind, use_dora):
    if kind == "int8" and use_dora:
        pytest.skip("PEFT 0.21 cannot build DoRA on an int8 layer on the CPU")
    model = lora_adapted(kind, use_dora=use_dora)
    before = weight_of(model)
    layer = model.base_model.model.target
    x = make_input(kind) if kind != "int8" else torch.randn(2, 5, 64)
    assert layer(x).isfinite().all()
    if kind in FLOAT_KINDS:
        merged = model.merge_and_unload().target.weight
        merged = merged.T if kind in ("conv1d", "embedding") else merged.flatten(1)
        assert_near(before, merged.double(), factor=5)


EVERY_LAYER = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def inputs_for(model):
    weight = model.base_model.model.target.base_layer
    if isinstance(weight, torch.nn.Embedding):
        return make_input("embedding")
    if isinstance(weight, torch.nn.Conv2d):
        return make_input("conv2d")
    width = getattr(weight, "in_features", 6)
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))


@EVERY_LAYER
@pytest.mark.parametrize("rank", ["exact", "keep"])
def test_a_scale_of_one_is_the_identity(make, rank):
    model = make()
    x = inputs_for(model)
    before = model(x)
    report = reduce_intruders(model, new_adapter="new", scale=1, scope="all", rank=rank, **OPTIONS)
    assert set(report.errors.values()) == {0.0}
    model.set_adapter("new")
    assert torch.equal(model(x), before)


@EVERY_LAYER
@pytest.mark.parametrize(("scope", "scale"), [("top", 0.7), ("all", 0.0)])
def test_the_copy_is_the_formula_and_harms_nothing(make, scope, scale):
    model = make()
    x = inputs_for(model)
    W, target = expected(model, scale, scope)
    before, config, output = state(model), model.peft_config["default"].to_dict(), model(x)
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    report = reduce_intruders(model, new_adapter="new", scale=scale, scope=scope, **OPTIONS)
    assert torch.equal(random, torch.get_rng_state())
    assert same(before, state(model))
    assert model.peft_config["default"].to_dict() == config
    assert all(p.requires_grad == trainable[n] for n, p in model.named_parameters() if n in trainable)
    assert model.active_adapters == ["default"]
    assert torch.equal(model(x), output)
    assert report.count > 0
    difference = (weight_of(model, "new").double() - target).abs().max()
    assert difference < 1e-4 * max(W.abs().max(), target.abs().max())
    assert max(report.errors.values()) < 1e-5
    model.set_adapter("new")
    assert model(x).isfinite().all()
    assert not torch.equal(model(x), output)


@EVERY_LAYER
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # not ours
@pytest.mark.filterwarnings("ignore:Adapter 'new'. 1 LoRA tensor")  # PEFT takes a bias for a broken factor
def test_the_copy_survives_saving_and_loading(make, tmp_path):
    model = make()
    x = inputs_for(model)
    reduce_intruders(model, new_adapter="new", scale=0.5, scope="all", **OPTIONS)
    model.set_adapter("new")
    before = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    model.load_adapter(tmp_path / "new", "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


STARTED = {init: partial(adapted, {}, "linear", init_lora_weights=init) for init in ("pissa", "olora")}
CHOSEN = {name: MAKERS[name] for name in ("loom linear lora", "lora linear", "loom linear dora")} | STARTED


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        pytest.param(make, rank, id=f"{name}-{rank}")
        for name, make in CHOSEN.items()
        for rank in ("keep", 2, 6)
        if not (name in STARTED and rank == 2)  # refused: less than what the adapter started from
    ],
)
def test_a_chosen_rank_and_its_error(make, rank):
    model = make()
    W, target = expected(model, 0.5, "all")
    report = reduce_intruders(model, new_adapter="new", scale=0.5, scope="all", rank=rank, **OPTIONS)
    layer = next(iter(LiveAdapter(model, "new").modules.values()))
    assert layer.rank == {"keep": 4}.get(rank, rank)
    if layer.magnitude() is None:
        difference = (layer.adapted_weight().double() - target).norm() / (target - W).norm()
        assert report.errors["target"] == pytest.approx(float(difference), abs=1e-5)


@pytest.mark.parametrize("kind", [*FLOAT_KINDS])
@pytest.mark.parametrize("make", [lora_adapted, lambda kind: adapted(ALL_PARTS, kind)], ids=["lora", "loom"])
def test_merging(make, kind):
    model = make(kind)
    _, target = expected(model, 0.5, "all")
    merged, report = merge_with_reduced_intruders(model, scale=0.5, scope="all", **OPTIONS)
    assert report.count > 0
    weight = merged.target.weight
    weight = weight.T if kind in ("conv1d", "embedding") else weight.flatten(1)
    assert_near(weight, target, factor=20)
    assert "lora" not in "".join(merged.state_dict())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("how", ["requantize", "dequantize"])
@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning")
def test_merging_into_a_quantised_base(kind, how):
    model = lora_adapted(kind)
    _W, target = expected(model, 0.5, "all")
    kind_of_layer = type(model.base_model.model.target.base_layer)
    merged, _ = merge_with_reduced_intruders(model, scale=0.5, scope="all", quantized=how, **OPTIONS)
    x = torch.randn(3, 64)
    wanted = x.double() @ target.T + merged.target.bias.double()
    error = float((merged(x).double() - wanted).norm() / wanted.norm())
    if how == "dequantize":
        assert type(merged.target) is torch.nn.Linear
        assert_near(merged.target.weight, target, factor=20)
        assert error < 1e-4
    else:
        assert type(merged.target) is kind_of_layer
        assert 1e-4 < error < 0.2


def test_a_quantised_base_needs_a_choice():
    with pytest.raises(ValueError, match="quantized=None"):
        merge_with_reduced_intruders(lora_adapted("nf4"))


def test_a_sweep_evaluates_every_scale_and_leaves_the_model_as_it_was():
    model = adapted(ALL_PARTS, "linear").train()
    x = make_input("linear")
    before, output = state(model), model(x)
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    seen = []

    def evaluate(m):
        seen.append(m(x).detach())
        return {"mean": seen[-1].mean().item()}

    report = sweep_intruders(model, "default", [1, 0.5, 0.0], evaluate, scope="all", **OPTIONS)
    assert torch.equal(seen[0], output)
    assert [point.scale for point in report.points] == [1, 0.5, 0.0]
    assert same(before, state(model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x), output)
    for point, result in zip(report.points, seen, strict=True):
        fresh = adapted(ALL_PARTS, "linear").train()
        reduce_intruders(fresh, new_adapter="new", scale=point.scale, scope="all", **OPTIONS)
        fresh.set_adapter("new")
        torch.testing.assert_close(fresh(x), result)
    assert json.loads(json.dumps(report.to_dict()))["points"][1]["metrics"] == report.points[1].metrics


def test_a_sweep_that_fails_leaves_the_model_as_it_was():
    model = adapted(ALL_PARTS, "linear")

    def evaluate(_):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        sweep_intruders(model, "default", [0.5], evaluate, **OPTIONS)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


def test_bases_are_kept_for_the_next_adapter(tmp_path, monkeypatch):
    model = adapted(PARTS[-1], "linear")
    first = find_intruders(model, bases=BasisCache(tmp_path), **OPTIONS)
    monkeypatch.setattr("loraloom.intruders.solvers.basis.left_basis", None)
    second = find_intruders(model, bases=BasisCache(tmp_path), **OPTIONS)
    assert first.to_dict() == second.to_dict()


def test_finding_changes_nothing():
    model = adapted(ALL_PARTS, "linear")
    before, random = state(model), torch.get_rng_state()
    report = find_intruders(model, **OPTIONS)
    assert same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    assert [layer.name for layer in report.layers] == ["target"]
    assert report.count == len(report.layers[0].intruders) > 0
    console = Console(width=120, file=io.StringIO())
    console.print(report.table())
    assert f"{report.count} of 4" in console.file.getvalue()


def test_wrong_arguments_are_named():
    model = adapted(PARTS[-1], "linear")
    with pytest.raises(ValueError, check=coded("no-adapter", "other")):
        find_intruders(model, "other")
    with pytest.raises(ValueError, match="'default' exists"):
        reduce_intruders(model, new_adapter="default")
    with pytest.raises(ValueError, check=coded("no-adapter")):
        find_intruders(Pair())
    model.merge_adapter()
    with pytest.raises(ValueError, check=coded("merged", "unmerge_adapter")):
        find_intruders(model)
