"""Metrics by their definitions, and the probe against scikit-learn."""

from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from loraloom.errors import InputError
from loraloom.training.config import Task
from loraloom.training.metrics import (
    DEFAULTS,
    METRICS,
    check_metrics,
    check_packages,
    compute_metrics,
    peak_memory_bytes,
)
from loraloom.training.probe import fit_logistic_regression, linear_probe, mean_pooled


def test_every_task_has_defaults_that_judge_it():
    assert set(DEFAULTS) == set(get_args(Task))
    for task, names in DEFAULTS.items():
        assert all(task in METRICS[name].tasks for name in names)


@pytest.mark.parametrize("seed", range(5))
def test_classification_by_the_definition(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, size=50)  # class 4 is never an answer, class 5 neither that nor predicted
    predictions = generator.integers(0, 5, size=50)
    found = compute_metrics(("loss", "accuracy", "macro_f1", "matthews_correlation"), predictions, labels)
    assert found["accuracy"] == pytest.approx((labels == predictions).mean())
    f1 = []
    for one in range(5):
        both = ((labels == one) & (predictions == one)).sum()
        f1.append(2 * both / ((labels == one).sum() + (predictions == one).sum()))
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    indicators = [np.eye(5)[ids] - np.eye(5)[ids].mean(0) for ids in (labels, predictions)]
    covariance = [(one * other).sum() for one in indicators for other in indicators]
    assert found["matthews_correlation"] == pytest.approx(covariance[1] / np.sqrt(covariance[0] * covariance[3]))


def test_regression_by_the_definition_and_constant_predictions():
    truth, answer = np.arange(20.0) ** 2, np.arange(20.0) ** 3  # the same order, not on a line
    found = compute_metrics(("pearson", "spearman", "mse"), answer, truth)
    assert found["pearson"] == pytest.approx(np.corrcoef(answer, truth)[0, 1])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mse"] == pytest.approx(np.mean((answer - truth) ** 2))
    assert compute_metrics(("pearson", "spearman"), np.ones(20), truth) == {"pearson": 0.0, "spearman": 0.0}


def test_entities_and_texts():
    truth, answer = [["B-A", "I-A", "O", "B-B"]], [["B-A", "O", "O", "B-B"]]  # the first entity is cut short
    found = compute_metrics(("entity_f1", "entity_precision", "token_accuracy"), answer, truth)
    assert found == pytest.approx({"entity_f1": 0.5, "entity_precision": 0.5, "token_accuracy": 0.75})
    found = compute_metrics(("exact_match", "rouge1", "bleu"), ["a red dog ran", "b"], ["a red dog ran", "c"])
    assert found["exact_match"] == found["rouge1"] == 0.5
    assert 0 < found["bleu"] < 1


@pytest.mark.parametrize(
    ("chosen", "code"), [("accuracy", "metrics-not-a-list"), ([], "metrics-not-a-list"), (["rougeL"], "unknown-metric")]
)
def test_metrics_that_the_task_does_not_have(chosen, code):
    with pytest.raises(InputError) as caught:
        check_metrics("text-classification", chosen)
    assert caught.value.code == code


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        check_packages(["loss", "rougeL"])
    assert caught.value.code == "missing-package"


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_bytes()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = torch.ones(before // 4 + 2**20, device=device)  # floats: more bytes than the peak so far
    assert peak_memory_bytes() >= block.nbytes


def test_logistic_regression_is_scikit_learns():
    torch.manual_seed(0)
    features = torch.randn(200, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 2
    labels = (features @ torch.randn(5, 3) + torch.randn(200, 3)).argmax(-1)
    penalty = 0.01
    layer = fit_logistic_regression(features, labels, 3, penalty)
    standardised = (features - features.mean(0)) / features.std(0)
    reference = LogisticRegression(C=1 / (penalty * 200), tol=1e-8, max_iter=1000).fit(standardised, labels)
    probabilities = layer(features).softmax(-1).detach().numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(standardised), atol=2e-3)


def test_probe_finds_what_is_linear():
    features = torch.randn(300, 8)
    labels = (features @ torch.randn(8, 4)).argmax(-1)
    probe = linear_probe(features, labels, 4)
    assert (probe(features).argmax(-1) == labels).float().mean() > 0.95


def test_mean_pooling_leaves_padding_out(pico_bert_dir):
    tokenizer = AutoTokenizer.from_pretrained(pico_bert_dir)
    model = AutoModel.from_pretrained(pico_bert_dir).eval()
    texts = ["the red dog runs and sleeps", "cat", "a bird eats the apple .", "why ?"]
    features = mean_pooled(model, tokenizer, texts, max_length=32, batch_size=2)
    for text, feature in zip(texts, features, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(feature, alone, rtol=1e-4, atol=1e-5)
