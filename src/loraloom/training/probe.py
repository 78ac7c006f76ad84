"""Logistic regression on frozen features: what a model knows about a task before any of its weights is trained."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


@torch.no_grad()
def mean_pooled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int = 64
) -> torch.Tensor:
    """Mean of the encoder's last hidden states over the tokens of each text, padding left out.

    Args:
        model: an encoder without a head; it is run in evaluation mode.
        tokenizer: its tokenizer.
        texts: n texts.
        max_length: tokens after which a text is cut.
        batch_size: texts at a time; texts of similar length go together.

    Returns:
        (n, hidden), float32, in the order of `texts`.
    """
    model.eval()
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = torch.tensor([len(row) for row in ids]).argsort()
    features = torch.empty(len(texts), model.config.hidden_size)
    for rows in order.split(batch_size):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(model.device)
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        features[rows] = ((hidden * mask).sum(1) / mask.sum(1)).float().cpu()
    return features


def fit_logistic_regression(features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> nn.Linear:
    """Multinomial logistic regression: min mean cross-entropy + penalty / 2 * ||W||^2 on standardised features.

    Args:
        features: (n, d), float.
        labels: (n,), class ids.
        classes: number of classes.
        penalty: L2 penalty on the weights, not on the bias.

    Returns:
        A linear layer (d -> classes) that takes the features as they are, not standardised.
    """
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-8)
    standardised = (features - mean) / deviation
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(standardised), labels) + penalty / 2 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        layer.weight.div_(deviation)
        layer.bias.sub_(layer.weight @ mean)
    return layer


def linear_probe(features: torch.Tensor, labels: torch.Tensor, classes: int) -> nn.Linear:
    """Logistic regression whose penalty is the one of `PENALTIES` with the best accuracy on every fifth row.

    Args:
        features: (n, d) of the training set; labels: (n,). The chosen penalty is then fitted on all rows.
    """
    held_out = torch.arange(len(labels)) % 5 == 0

    def held_out_accuracy(penalty: float) -> float:
        layer = fit_logistic_regression(features[~held_out], labels[~held_out], classes, penalty)
        return (layer(features[held_out]).argmax(-1) == labels[held_out]).float().mean().item()

    return fit_logistic_regression(features, labels, classes, max(PENALTIES, key=held_out_accuracy))
