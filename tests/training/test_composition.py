"""A run that composes trained adapters: what trains, what is saved, the portable result, resume, mistakes."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from loraloom.errors import InputError, RunInterruptedError
from loraloom.training import fit
from loraloom.training.config import CompositionSection, MethodSection
from loraloom.training.evaluate import evaluate_saved
from tests.refusals import coded

from .support import assert_equal_weights, elsewhere, weights, with_optimizer, with_training


def save_member(base, folder, seed, targets, rank):
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def members(pico_bert_dir, tmp_path):
    """Two adapters of other ranks; only the first adapts `value`."""
    ranks = {"one": (["query", "value"], 2), "two": (["query"], 4)}
    return {
        name: save_member(AutoModelForSequenceClassification.from_pretrained(pico_bert_dir), tmp_path / name, i, *rest)
        for i, (name, rest) in enumerate(ranks.items())
    }


@pytest.fixture
def composition(classification, members):
    """Learns the weights of the two members in 24 steps, and a head."""
    config = dataclasses.replace(
        classification, method=MethodSection(name="composition"), composition=CompositionSection(members=members)
    )
    return with_optimizer(config, head_lr=2e-2)


def composing(config, **keys):
    return dataclasses.replace(config, composition=dataclasses.replace(config.composition, **keys))


def test_it_learns_the_weights_and_nothing_of_the_members(composition):
    composition = composing(composition, constraint="softmax")
    result = fit.train(composition)
    assert result.after["loss"] < result.before["loss"]
    folder = Path(composition.output.dir)
    assert json.loads((folder / fit.RESULT).read_text()) == dataclasses.asdict(result)
    assert evaluate_saved(folder) == result.after
    learned = result.composition.weights
    assert {name.rpartition(".")[2] for name in learned} == {"query", "value"}
    for module, of_members in learned.items():
        assert sum(of_members.values()) == pytest.approx(1)
        assert list(of_members) == (["one", "two"] if module.endswith("query") else ["one"])
    queries = [w["one"] for module, w in learned.items() if module.endswith("query")]
    assert len({*queries}) == len(queries) == 2  # a weight of its own in each layer
    assert all(abs(w - 0.5) > 0.01 for w in queries)
    saved = weights(folder)
    for i, (name, path) in enumerate(composition.composition.members.items()):
        for key, tensor in weights(path).items():
            if "query" in key and "lora_A" in key:
                (stacked,) = (t for k, t in saved.items() if f"{key.partition('.lora_A')[0]}.loom_lora_A" in k)
                assert torch.equal(stacked[2 * i : 2 * i + len(tensor)], tensor), name


def test_the_portable_adapter_is_a_plain_lora_that_says_the_same(composition):
    result = fit.train(composition)
    assert result.composition.rank == 6
    config = json.loads((Path(result.composition.portable) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    data = fit.load_data(composition.data, "text-classification")
    tokenizer = fit.load_processor(composition.model)
    inputs = tokenizer(data.test["text"][:], return_tensors="pt", padding=True)
    logits = []
    for folder in (composition.output.dir, result.composition.portable):
        base, _ = fit.load_base(composition.model, data, tokenizer)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder).eval()(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_wider_scope_shares_the_weights(composition):
    result = fit.train(with_training(composing(composition, scope="module_type"), max_steps=4))
    queries = [w for module, w in result.composition.weights.items() if module.endswith("query")]
    assert queries[0] == pytest.approx(queries[1])
    assert queries[0]["one"] != pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("given", "expected"), [("uniform", (0.5, 0.5)), ({"one": 0.9, "two": -0.2}, (0.9, -0.2))])
def test_weights_that_are_given_do_not_train_but_a_head_does(composition, given, expected):
    result = fit.train(composing(composition, weights=given))
    assert result.after["loss"] < result.before["loss"]
    queries = [w for module, w in result.composition.weights.items() if module.endswith("query")]
    assert [tuple(w.values()) for w in queries] == [pytest.approx(expected)] * 2
    assert evaluate_saved(Path(composition.output.dir)) == result.after


def test_without_anything_to_train_it_is_evaluated_and_saved(causal, pico_llama_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    member = save_member(base, tmp_path / "member", 0, ["q_proj", "down_proj"], 2)
    section = CompositionSection(members={"only": member}, weights="uniform")
    config = dataclasses.replace(causal, method=MethodSection(name="composition"), composition=section)
    result = fit.train(config)
    assert (result.steps, result.trainable_parameters) == (0, 0)
    assert result.after == result.before == evaluate_saved(Path(config.output.dir))


def test_resume_is_bit_for_bit_the_uninterrupted_run(composition, ctrl_c, tmp_path):
    whole = fit.train(elsewhere(composition, tmp_path / "whole"))
    ctrl_c(5)
    with pytest.raises(RunInterruptedError, match="stopped after step 5 of 24"):
        fit.train(composition)
    with pytest.raises(InputError, check=coded("resume-differs", "layer", "model", "--resume", "composition.scope")):
        fit.train(composing(composition, scope="model"), resume=True)
    resumed = fit.train(composition, resume=True)
    assert_equal_weights(weights(composition.output.dir), weights(whole.output_dir))
    assert resumed.after == whole.after
    assert resumed.composition.weights == whole.composition.weights


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"members": {"one": "nowhere"}}, "nowhere"),
        ({"weights": {"one": 1.0}}, "two"),
        ({"weights": {"one": 1.0, "two": 1.0, "tree": 1.0}}, "tree"),
    ],
)
def test_mistakes_are_one_line(composition, keys, expected):
    with pytest.raises(InputError, check=coded("composition")) as caught:
        fit.train(composing(composition, **keys))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(composition, tmp_path, pico_llama_dir):
    other = save_member(AutoModel.from_pretrained(pico_llama_dir), tmp_path / "llama", 0, ["q_proj"], 2)
    with pytest.raises(InputError, check=coded("composition", "pico_llama")) as caught:
        fit.train(composing(composition, members={"other": other}))
    assert "\n" not in str(caught.value)
