"""Smaller ranks: the best there are, within the budget, with the error that they have."""

import peft
import pytest
import torch

from loraloom.adapter.open import open_adapter
from loraloom.errors import InputError
from loraloom.shrink.shrink import shrink_adapter
from tests.models import llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=3, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 1.0 if "layers.1" in name else 0.1  # one layer matters more
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(path := tmp_path_factory.mktemp("adapter") / "adapter")
    return path


def deltas(folder):
    return {name: module.update().delta().double() for name, module in open_adapter(folder).modules.items()}


@pytest.mark.parametrize("target", [{"rank": 3}, {"energy": 0.9}, {"parameters": 800}, {"rank": 8}])
def test_the_error_is_what_the_files_differ_by(folder, tmp_path, target):
    report = shrink_adapter(folder, tmp_path / "out", **target)
    before, after = deltas(folder), deltas(tmp_path / "out")
    lost = sum(float((before[n] - after[n]).norm() ** 2) for n in before)
    whole = sum(float(D.norm() ** 2) for D in before.values())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-6)
    for name, D in before.items():
        rank = report.ranks[name][1]
        S = torch.linalg.svdvals(D)
        best = float(S[rank:].norm() / S.norm())
        assert report.errors[name] == pytest.approx(best, rel=1e-4, abs=1e-6)
    if target == {"rank": 8}:
        assert report.error == 0.0
    if "energy" in target:
        assert max(report.errors.values()) ** 2 <= 0.1 + 1e-6
    if "parameters" in target:
        held = sum(module.rank * sum(module.shape) for module in open_adapter(tmp_path / "out").modules.values())
        assert held == report.parameters[1] <= 800
        ranks = {name: rank for name, (_, rank) in report.ranks.items()}
        assert max(ranks[n] for n in ranks if "layers.0" in n) <= min(ranks[n] for n in ranks if "layers.1" in n)


def test_heads_are_kept_and_stock_peft_loads_it(folder, tmp_path):
    shrink_adapter(folder, tmp_path / "out", rank=4)
    assert open_adapter(tmp_path / "out").others == open_adapter(folder).others != []
    heads = [dict(open_adapter(path).other_tensors()) for path in (folder, tmp_path / "out")]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    peft.PeftModel.from_pretrained(llama(), tmp_path / "out")


@pytest.mark.parametrize("wrong", [{}, {"rank": 0}, {"rank": 2, "energy": 0.5}, {"energy": 1.5}, {"parameters": 3}])
def test_wrong_targets_are_refused(folder, tmp_path, wrong):
    with pytest.raises(InputError) as error:
        shrink_adapter(folder, tmp_path / "out", **wrong)
    assert error.value.code in ("shrink-target", "rank")
    assert not (tmp_path / "out").exists()
