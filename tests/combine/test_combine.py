"""Adapters on disk, combined: logits and updates against PEFT's merged members and a dense reference."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom import LoomConfig
from loraloom.adapter.open import open_adapter
from loraloom.combine.combine import combine_adapters, parse_weights
from loraloom.errors import InputError
from tests.models import llama

TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}
    ),
    "moslora": LoomConfig.moslora(r=4, lora_alpha=6, target_modules=TARGETS),
    "gates": LoomConfig.weightlora(r=4, lora_alpha=6, target_modules=["v_proj", "down_proj"]),
}
METHODS = ("linear", "ties", "dare", "core")
IDS = torch.arange(12).reshape(2, 6)


def base():
    torch.manual_seed(0)
    return llama()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> folder of an adapter with random weights, and the logits of its model."""
    folders, logits = {}, {}
    for seed, (kind, config) in enumerate(KINDS.items()):
        model = peft.get_peft_model(base(), copy.deepcopy(config))
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folders[kind] = tmp_path_factory.mktemp("adapters") / kind
        model.save_pretrained(folders[kind])
        logits[kind] = answers(model)
    return folders, logits


@torch.no_grad()
def answers(model):
    return model.eval()(input_ids=IDS).logits


def deltas(folder):
    """Module -> its update, multiplied in float64."""
    factors = {name: module.factors() for name, module in open_adapter(folder).modules.items()}
    return {name: B.double() @ A.double() for name, (A, B) in factors.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_one_member_is_the_identity_in_stock_peft(saved, tmp_path, kind, method):
    folders, logits = saved
    report = combine_adapters([folders[kind]], tmp_path / "out", method)
    assert set(report.errors.values()) == {0.0}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(answers(model), logits[kind], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_one_member_is_the_identity_in_float64(saved, tmp_path, kind, method):
    """What is left is the rounding of the factors that are written, 6e-8 each."""
    folders, _ = saved
    combine_adapters([folders[kind]], tmp_path / "out", method)
    ours, theirs = deltas(tmp_path / "out"), deltas(folders[kind])
    assert ours.keys() == theirs.keys()
    for name, D in theirs.items():
        assert float((ours[name] - D).norm()) <= 1e-6 * float(D.norm())
    models = [peft.PeftModel.from_pretrained(base(), where).double() for where in (tmp_path / "out", folders[kind])]
    torch.testing.assert_close(*map(answers, models), atol=1e-6, rtol=0)


def test_a_sum_is_the_sum_of_what_peft_merges_member_by_member(saved, tmp_path):
    folders, _ = saved
    weights = dict(zip(KINDS, [1.0, -0.5, 0.7, 0.3, 2.0], strict=True))
    report = combine_adapters(list(folders.values()), tmp_path / "out", weights=list(weights.values()))
    expected = base().state_dict()
    for kind, folder in folders.items():
        merged = peft.PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()
        for key, W in base().state_dict().items():
            expected[key] = expected[key] + weights[kind] * (merged[key] - W)
    reference = base()
    reference.load_state_dict(expected)
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(answers(model), answers(reference), atol=1e-4, rtol=1e-4)
    assert len(report.missing[str(folders["gates"])]) == 2  # q_proj of both layers


@pytest.mark.parametrize("method", ["ties", "dare", "core"])
def test_a_rank_that_loses_says_how_much(saved, tmp_path, method):
    folders, _ = saved
    two = [folders["lora"], folders["rslora"]]
    combine_adapters(two, tmp_path / "full", method, rank=32)
    full, report = deltas(tmp_path / "full"), combine_adapters(two, tmp_path / "small", method, rank=3)
    for name, D in deltas(tmp_path / "small").items():
        assert float((full[name] - D).norm() / full[name].norm()) == pytest.approx(report.errors[name], rel=1e-3)
        assert report.ranks[name] == 3
    card = (tmp_path / "small/README.md").read_text()
    assert f"`{method}`" in card


def broken(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", ["dora", "head", "another base", "not finite", "weights", "nothing"])
def test_what_would_be_lost_or_wrong_is_refused_and_nothing_is_written(saved, tmp_path, case):
    folders, _ = saved
    members, weights = [folders["lora"]], None
    if case in ("dora", "head", "another base"):
        options = {"dora": {"use_dora": True}, "head": {"modules_to_save": ["lm_head"]}}.get(case, {})
        model = llama(width=16) if case == "another base" else base()
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "other")
        members.append(tmp_path / "other")
    elif case == "not finite":
        peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
        broken(tmp_path / "other", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
        members.append(tmp_path / "other")
    elif case == "weights":
        weights = [1.0, 2.0]
    else:
        members = []
    codes = {"dora": "magnitude", "head": "other-tensors", "another base": "shape", "not finite": "not-finite"}
    with pytest.raises(InputError) as error:
        combine_adapters(members, tmp_path / "out", weights=weights)
    assert error.value.code == codes.get(case, "weights" if case == "weights" else "members")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_the_command_line():
    assert parse_weights("0.7,-0.3", 2) == [0.7, -0.3]
    assert parse_weights(None, 2) is None
    for wrong in ("0.7", "a,b"):
        with pytest.raises(InputError) as error:
            parse_weights(wrong, 2)
        assert error.value.code == "weights"
