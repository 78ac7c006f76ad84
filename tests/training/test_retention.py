"""Retention: measured before and after, by the definition, and without changing the run."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loraloom.errors import InputError
from loraloom.training import fit
from loraloom.training.data import RunData, load_data
from loraloom.training.model import load_processor
from loraloom.training.retention import FrozenProbe, load_retention
from tests.refusals import coded

from .support import assert_equal_weights, elsewhere, weights, with_training

ANIMALS = ("dog", "cat", "bird")


@pytest.fixture(scope="session")
def animal_rows(tmp_path_factory):
    """A file of 120 short texts, labelled by the one animal that each names."""
    generator = random.Random(1)
    file = tmp_path_factory.mktemp("retained") / "animals.jsonl"
    rows = []
    for i in range(120):
        words = [*generator.choices(["apple", "runs", "the", "file"], k=5), ANIMALS[i % 3]]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "label": ANIMALS[i % 3]})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def with_retention(config, path, **keys):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, retention=str(path), **keys))


def test_the_probe_is_judged_on_the_trained_encoder(classification, animal_rows):
    config = with_retention(with_training(classification, learning_rate=0.2, max_steps=12), animal_rows)
    result = fit.train(config)
    before, after = result.retention["before"], result.retention["after"]
    assert before["accuracy"] > 0.8
    assert after["accuracy"] < before["accuracy"]  # a rate that destroys what the encoder knew
    assert json.loads((Path(config.output.dir) / fit.RESULT).read_text())["retention"] == result.retention


def test_the_probe_reads_the_encoder_alone(pico_bert_dir, animal_rows, classification):
    """Unchanged weights keep the metrics exactly; a new head over them changes nothing."""
    section = dataclasses.replace(classification.data, retention=str(animal_rows))
    tokenizer = load_processor(classification.model)
    data = load_retention(section, "text-classification")
    model = AutoModelForSequenceClassification.from_pretrained(pico_bert_dir, num_labels=3).train()
    state = torch.get_rng_state()
    probe = FrozenProbe(model, tokenizer, data, 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    first = probe.measure(model)
    torch.nn.init.normal_(model.classifier.weight)
    assert probe.measure(model) == first
    # By hand: the layer on the mean of each text's hidden states.
    encoder = AutoModel.from_pretrained(pico_bert_dir).eval()
    right = 0
    for text, label in zip(data.test["text"], data.test["label"], strict=True):
        hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        right += int(probe.layer(hidden.mean(0)).argmax() == label)
    assert first["accuracy"] == pytest.approx(right / len(data.test), abs=1e-9)


def test_it_does_not_change_the_run(classification, animal_rows):
    plain = fit.train(with_training(classification, max_steps=6))
    measured = elsewhere(with_training(classification, max_steps=6), classification.output.dir + "-measured")
    result = fit.train(with_retention(measured, animal_rows))
    assert result.after == plain.after
    assert plain.retention is None
    assert_equal_weights(weights(plain.output_dir), weights(result.output_dir))


def test_causal_is_the_loss_on_every_row_of_the_file(causal, animal_rows):
    config = with_retention(with_training(causal, max_steps=4), animal_rows)
    result = fit.train(config)
    tokenizer = AutoTokenizer.from_pretrained(config.output.dir)
    model = AutoModelForCausalLM.from_pretrained(config.model.name).eval()
    losses = []
    for line in animal_rows.read_text().splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, 1:, None])[:, 0])
    assert result.retention["before"]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert result.retention["after"] != result.retention["before"]
    assert set(result.after) == {"loss", "perplexity"}


def test_a_limit_and_a_mistake(classification, animal_rows, tmp_path):
    few = dataclasses.replace(classification.data, retention=str(animal_rows), max_retention=10)
    data = load_retention(few, "text-classification")
    assert isinstance(data, RunData)
    assert len(data.train) == len(data.test) == 10
    assert load_retention(classification.data, "text-classification") is None
    missing = with_retention(classification, tmp_path / "no.jsonl")
    with pytest.raises(InputError, check=coded("retention", "data.retention", "no.jsonl")):
        fit.train(missing)
    assert load_data(few, "text-classification").train.column_names == ["text", "label"]
