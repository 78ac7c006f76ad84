"""Metrics and the probe against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModel, AutoTokenizer, EvalPrediction

from loraloom.training.metrics import classification_metrics, peak_memory_bytes
from loraloom.training.probe import fit_logistic_regression, linear_probe, mean_pooled


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_and_macro_f1_are_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, size=50)  # class 4 is never an answer, class 5 neither that nor predicted
    logits = generator.normal(size=(50, 6))
    logits[:, 5] = -10
    metrics = classification_metrics(6)(EvalPrediction(predictions=logits, label_ids=labels))
    predictions = logits.argmax(-1)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))


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
