"""What a run is judged by: accuracy and macro-F1 of predictions, peak memory of the process."""

import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers import EvalPrediction


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions (n,) that equal their label (n,)."""
    return float(np.mean(predictions == labels))


def macro_f1(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean over classes of F1 = 2 tp / (predicted + actual); predictions and labels are class ids, shape (n,).

    A class that is neither predicted nor present says nothing and is left out, as scikit-learn does by default.
    """
    true_positive = np.bincount(labels[predictions == labels], minlength=classes)
    total = np.bincount(predictions, minlength=classes) + np.bincount(labels, minlength=classes)
    present = total > 0
    return float(np.mean(2 * true_positive[present] / total[present]))


def classification_metrics(classes: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of the Trainer: logits (n, classes) and labels (n,) to accuracy and macro-F1."""

    def compute(outcome: EvalPrediction) -> dict[str, float]:
        # Some heads return more than logits; the logits come first.
        logits = outcome.predictions[0] if isinstance(outcome.predictions, tuple) else outcome.predictions
        predictions, labels = np.argmax(logits, axis=-1), np.asarray(outcome.label_ids)
        return {
            "accuracy": accuracy(predictions, labels),
            "macro_f1": macro_f1(predictions, labels, classes),
        }

    return compute


def peak_memory_bytes() -> int | None:
    """Most memory held so far: allocated by torch on the GPU where there is one, else resident in the process.

    None on Windows, which does not say it through the standard library.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
