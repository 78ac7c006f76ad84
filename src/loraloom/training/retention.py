"""Forgetting, measured: a second evaluation set on which a model is judged before and after training on another.

For causal-lm it is the loss on that set. A classifier has no head for the second set's labels, so its encoder is
judged through a probe: logistic regression fitted once, on the features of the base before training, and then frozen.
What the probe loses is what training took from the features it reads.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from loraloom.errors import InputError
from loraloom.training.config import DataSection, RunConfig, Task
from loraloom.training.data import load_data
from loraloom.training.metrics import compute_metrics
from loraloom.training.model import resolve_max_length
from loraloom.training.probe import linear_probe, mean_pooled
from loraloom.training.tasks.base import RunData


def load_retention(section: DataSection, task: Task) -> RunData | None:
    """The rows of ``data.retention``, or None where it is not set.

    For causal-lm all rows of a file are for evaluation; of a hub data set it is the split that has the test's place.
    A probe is fitted on train and judged on test, which are told apart as those of ``data.path`` are.

    Raises:
        InputError: as :func:`load_data`.
    """
    if section.retention is None:
        return None
    is_file = task == "causal-lm" and section.retention.rpartition(".")[2] in (
        "jsonl",
        "json",
        "csv",
        "tsv",
        "txt",
        "parquet",
    )
    rows = DataSection(
        path=section.retention,
        test_path=section.retention if is_file else None,
        test_fraction=0.2,
        max_train=section.max_retention,
        max_test=section.max_retention,
        max_length=section.max_length,
        validation_fraction=0,
    )
    try:
        return load_data(rows, task)
    except InputError as error:
        raise InputError(f"data.retention: {error}", code="retention") from None


class Retention:
    """Measures a trainer's model on the rows of ``data.retention``; made before training.

    Attributes:
        before: the metrics at that time: loss and perplexity, or accuracy and macro_f1.
    """

    def __init__(
        self, trainer: Trainer, config: RunConfig, tokenizer: PreTrainedTokenizerBase, retained: RunData
    ) -> None:
        self.trainer: Any = trainer
        self.probe = None
        if config.model.task == "text-classification":
            model: Any = trainer.model
            self.probe = FrozenProbe(model, tokenizer, retained, resolve_max_length(config, tokenizer))
        self.before = self.measure()

    def measure(self) -> dict[str, float]:
        """The metrics of the model as it is now."""
        if self.probe is not None:
            return self.probe.measure(self.trainer.model)
        metrics = self.trainer.evaluate(self.trainer.retained, metric_key_prefix="retention")
        return {name: metrics[f"retention_{name}"] for name in ("loss", "perplexity")}


class FrozenProbe:
    """Logistic regression on the mean-pooled features that an encoder has now, to be applied to what it becomes.

    Args:
        model: a sequence classifier, with or without adapters.
        tokenizer: its tokenizer.
        data: rows with `text` and `label`; the probe is fitted on `train`.
        max_length: tokens after which a text is cut.

    Raises:
        InputError: the model's body gives no hidden states (``last_hidden_state``) to read features from.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: RunData, max_length: int) -> None:
        self.tokenizer, self.test, self.max_length = tokenizer, data.test, max_length
        self.classes = len(data.label_names)
        with torch.random.fork_rng():  # the run must not depend on whether it is measured
            labels = torch.tensor(data.train["label"][:])
            self.layer = linear_probe(self._features(model, data.train), labels, self.classes)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and macro-F1 of the probe on the test rows, with the model's features as they are now."""
        predictions = self.layer(self._features(model, self.test)).argmax(-1).numpy()
        labels = torch.tensor(self.test["label"][:]).numpy()
        return compute_metrics(("accuracy", "macro_f1"), predictions, labels)

    def _features(self, model: nn.Module, rows: Dataset) -> torch.Tensor:
        training = model.training
        try:
            return mean_pooled(_body(model), self.tokenizer, rows["text"][:], self.max_length)
        except AttributeError as error:
            raise InputError(
                f"data.retention: {type(_body(model)).__name__} gives no token features ({error})",
                code="retention",
            ) from error
        finally:
            model.train(training)


def _body(model: Any) -> Any:
    """The encoder under a head, with the adapters that are injected into it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.base_model
