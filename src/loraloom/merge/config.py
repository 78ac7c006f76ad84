"""The config.json of a merged model: the base's, where nothing that it says has changed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loraloom.errors import InputError
from loraloom.io.checkpoint import read_model_config

# PEFT's tasks whose model has a head that a pretrained base lacks -> how transformers names such a model.
CLASSIFIERS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


class Resized(NamedTuple):
    """A tensor that an adapter brings in another shape than the base's, or that the base lacks (``old`` is None)."""

    adapter: Path
    key: str
    old: tuple[int, ...] | None
    new: tuple[int, ...]
    task: str | None


def merged_config(
    config: Mapping[str, Any], dtype: torch.dtype | None, untied: bool, resized: Sequence[Resized]
) -> tuple[dict[str, Any], bool]:
    """The merged model's configuration, and whether its vocabulary has another size than the base's.

    Args:
        config: the base's, {} when it has none.
        dtype: what all weights were cast to; None for no cast.
        untied: the output head now has a tensor of its own.
        resized: tensors of another shape.

    Raises:
        InputError: a resized tensor that is neither the vocabulary's nor the head of a classifier.
    """
    new = dict(config)
    new.pop("quantization_config", None)
    if untied:
        new["tie_word_embeddings"] = False
    if dtype is not None and config:
        _set_dtype(new, dtype)
    vocabulary = vocabulary_size(config)
    labels: list[tuple[int, Path]] = []
    changed = False
    for tensor in resized:
        if tensor.old is not None and tensor.old[0] == vocabulary:
            changed = True
            _set_vocabulary(new, tensor.new[0])
        elif tensor.task in CLASSIFIERS:
            labels.append((tensor.new[0], tensor.adapter))
        elif tensor.old is not None:
            raise InputError(
                f"{tensor.adapter} replaces {tensor.key}, {list(tensor.old)} in the base, by a tensor of shape "
                f"{list(tensor.new)}; only vocabularies and the heads of classifiers may change their size",
                code="shape",
            )
    if labels and config:
        task = next(tensor.task for tensor in resized if tensor.task in CLASSIFIERS)
        count, adapter = min(labels)  # a head may have layers of its own, wider than its output
        _set_classifier(new, str(task), count, _label_names(adapter, count))
    return new, changed


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Tokens of the model with this config.json, None where it does not say."""
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def _set_vocabulary(config: dict[str, Any], size: int) -> None:
    if "vocab_size" in config:
        config["vocab_size"] = size
    else:
        config["text_config"] = {**config["text_config"], "vocab_size": size}


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for field in [field for field in ("dtype", "torch_dtype") if field in config] or ["torch_dtype"]:
        config[field] = name
    for key, part in config.items():  # of models made of several
        if isinstance(part, dict) and {"dtype", "torch_dtype"} & part.keys():
            config[key] = dict(part)
            _set_dtype(config[key], dtype)


def _label_names(adapter: Path, labels: int) -> list[str] | None:
    """The names that a config.json beside the adapter has for its labels, in order; None without one."""
    names = read_model_config(adapter).get("id2label") or {}
    return [str(names[str(i)]) for i in range(labels)] if set(names) == set(map(str, range(labels))) else None


def _set_classifier(config: dict[str, Any], task: str, labels: int, names: list[str] | None) -> None:
    """The class and the labels that a new head stands for."""
    architecture = (config.get("architectures") or [""])[0]
    body = re.sub(r"(Model|LMHeadModel|For[A-Z]\w*)$", "", architecture)
    if body:
        config["architectures"] = [body + CLASSIFIERS[task]]
    if task != "QUESTION_ANS" and (names or len(config.get("id2label") or {0: 0, 1: 1}) != labels):
        names = names or [f"LABEL_{i}" for i in range(labels)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
