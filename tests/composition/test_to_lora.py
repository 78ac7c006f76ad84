"""A composition as an ordinary LoRA: exact for stock PEFT, or truncated with the true error."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from loraloom import LoomConfig, compose
from loraloom.composition import to_lora
from loraloom.errors import InputError
from tests.composition.support import LINEARS, MEMBERS, WEIGHTS, base, ids, lora, set_logits
from tests.refusals import coded
from tests.tuner.support import assert_near, randomise

pytestmark = [
    # PEFT's: of a Conv1D beside a Linear, of the bias of a lora_B, and of one on a layer without a bias.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer of type Linear has no bias"),
]


def stock(folder, net=None):
    return PeftModel.from_pretrained(base() if net is None else net, folder).eval()


@torch.no_grad()
def out(model):
    return model(ids())


def some(members, *names):
    """Some of the members; PEFT has no LoRA with both an embedding (squad) and a lora_bias (fever)."""
    return {name: members[name] for name in names}, {name: WEIGHTS[name] for name in names}


PAIRS = [("squad", "nli"), ("fever", "nli")]


def deltas(model, adapter="composition"):
    layers = model.get_base_model().named_modules()
    return {n: layer.get_delta_weight(adapter).double() for n, layer in layers if hasattr(layer, "loom_lora_A")}


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "given"])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_exact_lora_loads_in_stock_peft_with_the_same_output(members, tmp_path, names, learned):
    folders, weights = some(members, *names)
    model = compose(base(), folders, "learned" if learned else weights).eval()
    set_logits(model)
    report = to_lora(model, save_to=tmp_path)
    assert report.relative_error == 0
    assert report.rank == max(layer["rank"] for layer in report.layers.values()) == {"squad": 7, "fever": 6}[names[0]]
    assert_near(out(stock(tmp_path)), out(model), factor=3)


def test_stock_peft_needs_no_loraloom(members, tmp_path):
    model = compose(base(), *some(members, "squad", "nli")).eval()
    to_lora(model, save_to=tmp_path)
    script = (
        "import sys, torch; from peft import PeftModel; from tests.composition.support import base, ids\n"
        f"output = PeftModel.from_pretrained(base(), {str(tmp_path)!r}).eval()(ids())\n"
        "assert 'loraloom' not in sys.modules\n"
        f"torch.save(output.detach(), {str(tmp_path / 'output.pt')!r})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert_near(torch.load(tmp_path / "output.pt"), out(model), factor=3)


@pytest.mark.parametrize("name", MEMBERS)
def test_one_member_of_weight_one_is_the_identity(members, tmp_path, name):
    """rsLoRA, lora_bias and patterns, where PEFT's add_weighted_adapter with weight 1.0 changes the adapter."""
    model = compose(base(), {name: members[name]}, {name: 1.0}).eval()
    to_lora(model, save_to=tmp_path)
    original = lora(name)
    assert_near(out(model), out(original))
    assert_near(out(stock(tmp_path)), out(original))
    if name == "fever":
        original.add_weighted_adapter(["default"], [1.0], "again", combination_type="linear")
        ours = out(original)
        original.set_adapter("again")
        assert (out(original) - ours).abs().max() > 0.01  # the case has power: PEFT itself fails it


def test_the_truncation_error_is_the_dense_one(members, tmp_path):
    model = compose(base(), some(members, "squad", "nli")[0]).eval()
    set_logits(model)
    dense = deltas(model)
    for rank in (1, 2, 3):
        report = to_lora(model, rank=rank, save_to=tmp_path / str(rank))
        truncated = stock(tmp_path / str(rank))
        squares = torch.zeros(2).double()
        for module, delta in dense.items():
            now = truncated.get_base_model().get_submodule(module).get_delta_weight("default").double()
            error, norm = (delta - now).norm(), delta.norm()
            singular = torch.linalg.svdvals(delta.flatten(1))
            assert report.layers[module]["relative_error"] == pytest.approx((error / norm).item(), abs=2e-6)
            # No rank-k matrix is nearer.
            assert error.item() == pytest.approx(singular[rank:].norm().item(), rel=1e-4, abs=1e-5)
            squares += torch.stack([error, norm]).square()
        assert report.relative_error == pytest.approx((squares[0] / squares[1]).sqrt().item(), abs=2e-6)
        assert report.relative_error > 0.05
        assert truncated.peft_config["default"].r == rank


def test_energy_chooses_the_smallest_rank_that_keeps_it(members):
    model = compose(base(), some(members, "squad", "nli")[0]).eval()
    shares = {}
    for module, delta in deltas(model).items():
        squares = torch.linalg.svdvals(delta.flatten(1)).square()
        shares[module] = squares.cumsum(0) / squares.sum()
    for energy in (0.5, 0.9, 0.99):
        report = to_lora(model, energy=energy)
        assert report.rank == max(int((share < energy).sum()) + 1 for share in shares.values())
        assert all(layer["relative_error"] ** 2 <= 1 - energy + 1e-9 for layer in report.layers.values())
    assert to_lora(model, energy=1.0).relative_error < 1e-6
    assert to_lora(model, rank=100).rank == to_lora(model).rank


def test_a_new_adapter_of_the_model_holds_the_lora(members):
    model = compose(base(), some(members, "squad", "nli")[0]).eval()
    expected = out(model)
    to_lora(model, new_adapter="plain")
    assert_near(out(model), expected, factor=3)  # the composition is still the active one
    model.set_adapter("plain")
    assert_near(out(model), expected, factor=3)
    assert model.peft_config["plain"].composition is None


def test_a_member_bias_goes_where_it_can_or_is_refused(members, tmp_path):
    with pytest.raises(InputError, check=coded("bias", "save_to")):
        to_lora(compose(base(), members), new_adapter="plain")
    with pytest.raises(InputError, check=coded("bias")):
        to_lora(compose(base(), members), save_to=tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_takes_any_adapter_without_a_magnitude(tmp_path):
    parts = {"use_mixer": "orthogonal", "use_gate": True, "use_rslora": True, "init_lora_weights": "olora"}
    model = get_peft_model(base(), LoomConfig(r=3, target_modules=[*LINEARS, "mix"], **parts)).eval()
    randomise(model)
    to_lora(model, "default", save_to=tmp_path)
    assert_near(out(stock(tmp_path)), out(model), factor=3)
    model = get_peft_model(base(), LoomConfig(target_modules=LINEARS, use_dora=True))
    with pytest.raises(InputError, check=coded("dora")):
        to_lora(model, "default")


def test_a_trained_head_goes_along(members, tmp_path):
    model = compose(base(), *some(members, "squad", "nli"), modules_to_save=["mix"]).eval()
    with torch.no_grad():
        model.get_base_model().mix.modules_to_save["composition"].weight.mul_(2)
    to_lora(model, save_to=tmp_path)
    assert_near(out(stock(tmp_path)), out(model), factor=3)


def test_the_file_is_a_portable_lora(members, tmp_path):
    """One rank, scale 1, no patterns: what servers read alike."""
    to_lora(compose(base(), *some(members, "squad", "nli")), save_to=tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.r == config.lora_alpha == 7
    assert not any(getattr(config, key) for key in ("rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.shape[0] for k, v in state.items() if "_A" in k} == {7}
    assert state["base_model.model.plain.lora_B.weight"].shape == (7, 7)


def test_a_folder_that_holds_something_is_left_alone(members, tmp_path):
    before = {path.name: path.read_bytes() for path in members["squad"].iterdir()}
    model = compose(base(), {"squad": members["squad"]})
    with pytest.raises(InputError) as error:
        to_lora(model, save_to=members["squad"])
    assert error.value.code == "not-empty"
    assert {path.name: path.read_bytes() for path in members["squad"].iterdir()} == before
    to_lora(model, save_to=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()
    to_lora(model, save_to=tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "other"}, "'other'.*composition"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "energy": 0.9}, "give one of them"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"new_adapter": "composition"}, "already"),
    ],
)
def test_wrong_options_are_errors(members, options, message):
    with pytest.raises(InputError, match=message):
        to_lora(compose(base(), some(members, "squad")[0]), **options)
