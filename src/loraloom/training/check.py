"""Keys of RUN.yaml that contradict each other, or have no meaning beside the others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from loraloom.annotations import matches
from loraloom.errors import InputError
from loraloom.optim.options import ProjectionOptions
from loraloom.optim.registry import OPTIMIZERS
from loraloom.training.builtin import SMOLLM2, is_encoder
from loraloom.training.config import (
    CLASSIFICATION,
    COMPOSITION,
    DATA_KEYS,
    EXPANSION_KEYS,
    METHODS_WITH_SELECTION,
    METHODS_WITHOUT_ADAPTER,
    OPTIMIZER_KEYS_OF_TRAINING,
    SELECTION_KEYS,
    TASKS_WITH_HEAD,
    CompositionSection,
    DataSection,
    MethodSection,
    Number,
    OptimizerSection,
    RunConfig,
)
from loraloom.training.metrics import check_metrics


def check_combinations(config: RunConfig) -> None:
    """Raises InputError where keys contradict each other, or one has no meaning beside the others."""
    method, model = config.method, config.model
    if method.name in (*METHODS_WITHOUT_ADAPTER, COMPOSITION):
        default = MethodSection(name=method.name)
        for f in dataclasses.fields(method):
            if getattr(method, f.name) != getattr(default, f.name):
                raise InputError(
                    f"method.{f.name} has no meaning for method.name {method.name!r}: remove it", code="no-meaning"
                )
        if model.quantization != "none" and method.name == "full":
            raise InputError(
                f"method.name 'full' cannot train weights in {model.quantization}: use 'lora' or 'none'",
                code="quantized",
            )
    if model.task not in TASKS_WITH_HEAD:
        if method.name == "probe":
            raise InputError(
                f"method.name 'probe' trains a classification head, and model.task {model.task!r} has none: use one of "
                f"{', '.join(TASKS_WITH_HEAD)}",
                code="no-meaning",
            )
        if is_encoder(model.name):
            raise InputError(
                f"model.name {model.name!r} is an encoder: name a language model for model.task {model.task!r}, such "
                f"as {SMOLLM2}",
                code="unknown-choice",
            )
    for key, owner in {"output_dir": "output.dir", "resume_from_checkpoint": "--resume"}.items():
        if key in config.training:
            raise InputError(f"training.{key} is set by loraloom: use {owner}", code="set-elsewhere")
    _check_composition(config)
    _check_selection(method, config.training)
    _check_optimizer(config)
    if not 0 < config.data.test_fraction < 1:
        raise InputError(f"data.test_fraction: {config.data.test_fraction} is not between 0 and 1", code="out-of-range")
    if not 0 <= config.data.validation_fraction < 1:
        raise InputError(
            f"data.validation_fraction: {config.data.validation_fraction} is not from 0 to below 1", code="out-of-range"
        )
    _check_data(config)
    check_metrics(model.task, config.training.get("metrics"))


def _check_data(config: RunConfig) -> None:
    """Keys of `data` and `training` that only some tasks read."""
    task, default = config.model.task, DataSection()
    for key, tasks in DATA_KEYS.items():
        if getattr(config.data, key) != getattr(default, key) and task not in tasks:
            raise InputError(
                f"data.{key} is read for {' and '.join(tasks)}, not for {task!r}: remove it", code="no-meaning"
            )
    mix = config.data.mix
    if any(share <= 0 for share in mix.values()) or sum(mix.values()) >= 1:
        raise InputError(
            f"data.mix: {mix}: expected shares above 0 with a sum below 1; data.path has the rest", code="mix-shares"
        )
    if not mix and config.data.mix_until != default.mix_until:
        raise InputError("data.mix_until has no meaning without data.mix: remove it", code="no-meaning")
    weights = config.training.get("class_weights")
    if weights is None:
        return
    if task not in (*CLASSIFICATION, "token-classification"):
        raise InputError(f"training.class_weights has no meaning for model.task {task!r}: remove it", code="no-meaning")
    if weights != "balanced" and not matches(weights, dict[str, Number]):
        raise InputError(
            f"training.class_weights: {weights!r} is neither 'balanced' nor a mapping of label to number",
            code="class-weights",
        )


def _check_composition(config: RunConfig) -> None:
    composition, name = config.composition, config.method.name
    if name != COMPOSITION:
        if composition != CompositionSection():
            raise InputError(
                f"section 'composition' needs method.name {COMPOSITION!r}, not {name!r}: remove method.name, and use "
                "loraloom compose",
                code="no-meaning",
            )
        return
    if not composition.members:
        raise InputError("composition.members is empty: give each adapter a name and its folder", code="members")
    if composition.weights != "learned":
        for key in ("scope", "constraint", "normalize"):
            if (value := getattr(composition, key)) != getattr(CompositionSection, key):
                raise InputError(
                    f"composition.{key} {value!r} has no meaning for weights {composition.weights!r}, which do not "
                    "train: remove it",
                    code="no-meaning",
                )


def _check_selection(method: MethodSection, training: Mapping[str, Any]) -> None:
    for keys, owners in ((SELECTION_KEYS, METHODS_WITH_SELECTION), (EXPANSION_KEYS, ("weightlora+",))):
        for key in keys:
            if getattr(method, key) is not None and method.name not in owners:
                raise InputError(
                    f"method.{key} has no meaning for method.name {method.name!r}: remove it, or use {owners[0]!r}",
                    code="no-meaning",
                )
    if method.expand_parameters is not None and (method.expand_times, method.expand_every) != (None, None):
        raise InputError(
            f"method.expand_parameters {method.expand_parameters} expands once: remove expand_times and expand_every",
            code="exclusive",
        )
    if method.name in METHODS_WITH_SELECTION and training.get("load_best_model_at_end"):
        raise InputError(
            f"training.load_best_model_at_end cannot be used with method.name {method.name!r}, whose best checkpoint "
            "may have other adapters than the model at the end: set it to false",
            code="best-model",
        )


def _check_optimizer(config: RunConfig) -> None:
    """Two places can describe the optimizer; each key is honoured where it stands, or an error."""
    optimizer, method, training = config.optimizer, config.method, config.training
    if "optim" in training:
        if optimizer != OptimizerSection():
            raise InputError(
                f"training.optim {training['optim']!r} is an optimizer of transformers, which does not read the "
                "section optimizer: remove one of them",
                code="optimizer",
            )
        if method.name in METHODS_WITH_SELECTION:
            raise InputError(
                f"training.optim {training['optim']!r} cannot select: remove it, {method.name!r} uses weight_adam",
                code="optimizer",
            )
    else:
        for key, owner in OPTIMIZER_KEYS_OF_TRAINING.items():
            if key in training:
                raise InputError(
                    f"training.{key} is read by the optimizers of training.optim alone: use {owner}", code="optimizer"
                )
    if method.name in METHODS_WITH_SELECTION and optimizer.name not in (None, "weight_adam"):
        raise InputError(
            f"optimizer.name {optimizer.name!r} cannot select adapters: "
            f"method.name {method.name!r} needs 'weight_adam'",
            code="optimizer",
        )
    if optimizer.name and issubclass(OPTIMIZERS[optimizer.name].options, ProjectionOptions) and method.name != "full":
        raise InputError(
            f"optimizer.name {optimizer.name!r} is for whole weights, method.name {method.name!r} trains small "
            "matrices: set method.name to 'full', or optimizer.name to 'adamw'",
            code="optimizer",
        )
    if optimizer.betas is not None and len(optimizer.betas) != 2:
        raise InputError(
            f"optimizer.betas: {optimizer.betas} is not two numbers, such as [0.9, 0.999]", code="option-value"
        )
