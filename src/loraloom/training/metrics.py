"""What a run is judged by: one table of metrics, each a function of a library. Importing this file imports no torch.

A metric takes predictions and references, whatever they are for its tasks: class ids (n,), 0/1 matrices (n, labels),
numbers (n,), lists of tags, or texts. `loss` is every task's, computed by its trainer, and stands first.
"""

import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import CLASSIFICATION, Task

LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae")


@dataclass(frozen=True)
class Metric:
    """A metric, the tasks that it judges, and the package that computes it."""

    tasks: tuple[str, ...]
    compute: Callable[[Any, Any], float] | None
    """(predictions, references) -> value; None: the trainer reports it."""
    package: str = "sklearn"


def _sklearn(function: str, **options: Any) -> Callable[[Any, Any], float]:
    def compute(predictions: Any, references: Any) -> float:
        from sklearn import metrics

        return float(getattr(metrics, function)(references, predictions, **options))

    return compute


def _correlation(function: str) -> Callable[[Any, Any], float]:
    def compute(predictions: Any, references: Any) -> float:
        from scipy import stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            value = float(getattr(stats, function)(predictions, references).statistic)
        return 0.0 if math.isnan(value) else value  # predictions that are all the same follow nothing

    return compute


def _seqeval(function: str, **options: Any) -> Callable[[Any, Any], float]:
    def compute(predictions: Any, references: Any) -> float:
        from seqeval import metrics

        return float(getattr(metrics, function)(references, predictions, **options))

    return compute


def _rouge(name: str) -> Callable[[Any, Any], float]:
    def compute(predictions: Sequence[str], references: Sequence[str]) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], use_stemmer=True)
        pairs = zip(references, predictions, strict=True)
        return sum(scorer.score(*pair)[name].fmeasure for pair in pairs) / len(references)

    return compute


def _sacrebleu(function: str) -> Callable[[Any, Any], float]:
    def compute(predictions: Sequence[str], references: Sequence[str]) -> float:
        import sacrebleu

        return getattr(sacrebleu, function)(list(predictions), [list(references)]).score / 100

    return compute


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    matches = [one.strip() == other.strip() for one, other in zip(predictions, references, strict=True)]
    return sum(matches) / len(matches)


WRITING_NEXT = ("causal-lm", "vision-language")  # judged by the loss of the next token
_LABELS = (*CLASSIFICATION, "multi-label")
METRICS: dict[str, Metric] = {
    "accuracy": Metric(CLASSIFICATION, _sklearn("accuracy_score")),
    "macro_f1": Metric(_LABELS, _sklearn("f1_score", average="macro", zero_division=0)),
    "micro_f1": Metric(_LABELS, _sklearn("f1_score", average="micro", zero_division=0)),
    "weighted_f1": Metric(_LABELS, _sklearn("f1_score", average="weighted", zero_division=0)),
    "balanced_accuracy": Metric(CLASSIFICATION, _sklearn("balanced_accuracy_score")),
    "matthews_correlation": Metric(CLASSIFICATION, _sklearn("matthews_corrcoef")),
    "exact_labels": Metric(("multi-label",), _sklearn("accuracy_score")),
    "pearson": Metric(("text-regression",), _correlation("pearsonr"), "scipy"),
    "spearman": Metric(("text-regression",), _correlation("spearmanr"), "scipy"),
    "mse": Metric(("text-regression",), _sklearn("mean_squared_error")),
    "mae": Metric(("text-regression",), _sklearn("mean_absolute_error")),
    "entity_f1": Metric(("token-classification",), _seqeval("f1_score", zero_division=0), "seqeval"),
    "entity_precision": Metric(("token-classification",), _seqeval("precision_score", zero_division=0), "seqeval"),
    "entity_recall": Metric(("token-classification",), _seqeval("recall_score", zero_division=0), "seqeval"),
    "token_accuracy": Metric(("token-classification",), _seqeval("accuracy_score"), "seqeval"),
    "rougeL": Metric(("seq2seq-lm",), _rouge("rougeL"), "rouge_score"),
    "rouge1": Metric(("seq2seq-lm",), _rouge("rouge1"), "rouge_score"),
    "rouge2": Metric(("seq2seq-lm",), _rouge("rouge2"), "rouge_score"),
    "exact_match": Metric(("seq2seq-lm",), _exact_match),
    "bleu": Metric(("seq2seq-lm",), _sacrebleu("corpus_bleu"), "sacrebleu"),
    "chrf": Metric(("seq2seq-lm",), _sacrebleu("corpus_chrf"), "sacrebleu"),
    "perplexity": Metric(WRITING_NEXT, None),
    "reward_accuracy": Metric(("preference",), None),
    "reward_margin": Metric(("preference",), None),
}
DEFAULTS: dict[Task, tuple[str, ...]] = {
    "text-classification": ("accuracy", "macro_f1"),
    "multi-label": ("micro_f1", "macro_f1"),
    "text-regression": ("pearson", "spearman"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall"),
    "seq2seq-lm": ("rougeL", "rouge1", "rouge2"),
    "causal-lm": ("perplexity",),
    "preference": ("reward_accuracy", "reward_margin"),
    "image-classification": ("accuracy", "macro_f1"),
    "vision-language": ("perplexity",),
}


def metric_names(task: Task, chosen: Sequence[str] | None = None) -> list[str]:
    """What a run of the task reports: the loss, and `training.metrics` or the task's defaults."""
    return ["loss", *(chosen or DEFAULTS[task])]


def main_metric(task: Task, chosen: Sequence[str] | None = None) -> str:
    """What a run is judged by: the first metric; the loss for language models, as perplexity is the same."""
    return "loss" if task in WRITING_NEXT else metric_names(task, chosen)[1]


def check_metrics(task: Task, chosen: Any) -> None:
    """Check `training.metrics`.

    Raises:
        InputError: it is not a list of metrics that the task has.
    """
    if chosen is None:
        return
    known = [name for name, metric in METRICS.items() if task in metric.tasks]
    if not isinstance(chosen, list) or not chosen:
        raise InputError(f"training.metrics: {chosen!r} is not a list of {', '.join(known)}", code="metrics-not-a-list")
    for name in chosen:
        if name not in known:
            raise InputError(
                f"training.metrics: {name!r} is no metric of {task!r}; expected some of {', '.join(known)}"
                f"{did_you_mean(str(name), known)}",
                code="unknown-metric",
            )


def check_packages(names: Sequence[str]) -> None:
    """Raises InputError if a metric's package is missing: before training, not after it."""
    for name in names:
        if name in METRICS and importlib.util.find_spec(METRICS[name].package) is None:
            raise InputError(
                f"metric {name!r} needs {METRICS[name].package}: pip install 'loraloom[metrics]', or choose others in "
                "training.metrics",
                code="missing-package",
            )


def compute_metrics(names: Sequence[str], predictions: Any, references: Any) -> dict[str, float]:
    """Those of the metrics that are functions of predictions and references, name to value."""
    found = {}
    for name in names:
        if name in METRICS and (compute := METRICS[name].compute) is not None:
            found[name] = compute(predictions, references)
    return found


def peak_memory_bytes() -> int | None:
    """Most memory held so far: allocated by torch on the GPU where there is one, else resident in the process.

    None on Windows, which does not say it through the standard library.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
