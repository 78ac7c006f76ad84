"""A LoRA from two checkpoints: what was merged in comes out again, and what a LoRA cannot hold is named."""

import peft
import pytest
import torch

from loraloom.adapter.open import open_adapter
from loraloom.errors import InputError, RunFailedError
from loraloom.extract.extract import extract_adapter
from tests.models import gpt2, llama

IDS = torch.arange(12).reshape(2, 6)


@torch.no_grad()
def answers(model):
    return model.eval()(input_ids=IDS).logits


def models(make, targets, tmp_path):
    """A base, the base with a random LoRA of rank 8 merged, in folders; and the merged model."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=4, target_modules=targets, fan_in_fan_out=make is gpt2)
    )
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in tuned.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    return merged, deltas


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, ["q_proj", "down_proj", "up_proj"]), (gpt2, ["c_attn", "c_proj"])],
    ids=["linear", "conv1d"],
)
def test_base_and_base_with_a_lora_give_the_lora_back(tmp_path, make, targets):
    merged, deltas = models(make, targets, tmp_path)
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8)
    assert report.errors.keys() == deltas.keys()
    assert max(report.errors.values()) < 1e-5
    assert not report.left_out
    adapter = open_adapter(tmp_path / "out")
    for name, D in deltas.items():
        ours = adapter.modules[name].update().delta().double()
        D = D.T if make is gpt2 else D
        # Merging rounded W + D to float32, so D is known to eps * ||W|| only.
        assert float((ours - D).norm() / D.norm()) < 1e-5
    model = peft.PeftModel.from_pretrained(make().from_pretrained(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(answers(model), answers(merged), atol=1e-5, rtol=0)


def test_what_no_lora_can_hold_is_named_with_its_size(tmp_path):
    merged, _ = models(llama, ["q_proj"], tmp_path)
    with torch.no_grad():
        merged.model.embed_tokens.weight.mul_(1.5)
        merged.model.norm.weight.mul_(2)
    merged.save_pretrained(tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8)
    assert report.left_out == pytest.approx({"model.embed_tokens.weight": 0.5, "model.norm.weight": 1.0}, rel=1e-5)


def test_a_rank_under_that_of_the_difference_says_what_it_loses(tmp_path):
    _, deltas = models(llama, ["q_proj"], tmp_path)
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    for name, D in deltas.items():
        S = torch.linalg.svdvals(D)
        assert report.errors[name] == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-3)


def test_equal_and_different_models_are_errors(tmp_path):
    models(llama, ["q_proj"], tmp_path)
    with pytest.raises(RunFailedError) as error:
        extract_adapter(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    assert error.value.code == "zero"
    for other, code in ((llama(width=16), "shape"), (gpt2(), "different-models")):
        other.save_pretrained(tmp_path / code)
        with pytest.raises(InputError) as error:
            extract_adapter(tmp_path / "base", tmp_path / code, tmp_path / "out")
        assert error.value.code == code
    assert not (tmp_path / "out").exists()
