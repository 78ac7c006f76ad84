"""Names in a configuration that match nothing: an error instead of an adapter smaller than asked for."""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from loraloom.errors import InputError
from loraloom.patterns import ends_with, pattern_value
from loraloom.text import nearest
from loraloom.tuner.peft_internals import HEADS_SAVED_LATER, BaseTunerLayer, expand_all_linear


def prepare_targets(config: Any, model: nn.Module, is_target: Callable[[str], Any]) -> None:
    """Expands "all-linear" to names, without modules_to_save, and checks the names of a configuration that is new.

    Args:
        config: a ``LoomConfig`` whose target_modules are set.
        model: the model to adapt; nothing is changed.
        is_target: PEFT's own test of a module name against the config.

    Raises:
        ValueError: a name in target_modules, or a key of a pattern, matches nothing; the message lists the nearest
            module names. With ``config.allow_unmatched`` it is a warning.
    """
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    if all_linear:
        expand_all_linear(config, model)
        # PEFT would adapt them, and then fail to wrap an adapted module as one to be trained in full.
        config.target_modules = {name for name in config.target_modules if not _is_saved(name, config)}
    if config.loom_format_version is None:
        _check_names(config, model, is_target, all_linear)


def check_tokens(config: Any, model: nn.Module) -> None:
    """Raises InputError where trainable_token_indices has a row that the table does not have."""
    given = config.trainable_token_indices
    if not given:
        return
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    rows = given if isinstance(given, dict) else dict.fromkeys(tables, given)
    for wanted, indices in rows.items():
        sizes = [table.num_embeddings for name, table in tables.items() if ends_with(name, wanted)]
        if sizes and not all(0 <= index < max(sizes) for index in indices):
            raise InputError(
                f"trainable_token_indices names row {max(indices, key=abs)} of {wanted}, which has {max(sizes)} rows",
                code="tokens",
            )


def _is_saved(name: str, config: Any) -> bool:
    """PEFT's rule: any ending is a match, so that "classifier" saves "pre_classifier" too."""
    saved = (*(config.modules_to_save or ()), *HEADS_SAVED_LATER.get(config.task_type, ()))
    return any(name.endswith(ending) or f".{ending}." in f".{name}" for ending in saved)


def _check_names(config: Any, model: nn.Module, is_target: Callable[[str], Any], all_linear: bool) -> None:
    adapter_parts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(adapter_parts)]
    targets = [name for name in names if is_target(name)]
    problems = []
    if isinstance(config.target_modules, str):
        if not targets:
            problems.append(_problem("target_modules", config.target_modules, names))
    elif not all_linear:
        for wanted in sorted(config.target_modules or ()):
            # A name that exclude_modules or layers_to_transform leaves out is no mistake.
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                problems.append(_problem("target_modules", wanted, names))
    if clashes := [name for name in targets if _is_saved(name, config)]:
        problems.append(f"target_modules: {clashes[0]!r} is trained in full (modules_to_save), so it has no adapter.")
    parameters = [name for name, _ in model.named_parameters()]
    for wanted in config.target_parameters or ():
        if not any(f".{name}".replace(".base_layer", "").endswith(f".{wanted}") for name in parameters):
            problems.append(_problem("target_parameters", wanted, parameters))
    targets += [name for name in parameters if name.endswith(tuple(f".{p}" for p in config.target_parameters or ()))]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(pattern_value({pattern: True}, name, False) for name in targets):
                problems.append(_problem(option, pattern, targets))
    if problems and config.allow_unmatched:
        warnings.warn(" ".join(problems), RuntimeWarning, stacklevel=2)
    elif problems:
        raise ValueError(" ".join(problems) + " Correct the names, or pass allow_unmatched=True to go on without them.")


def _problem(option: str, wanted: str, names: Iterable[str]) -> str:
    endings = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    near = nearest(re.split(r"[^\w]", wanted)[-1], sorted(endings), count=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"the model has: {', '.join(sorted(endings)[:12])}"
    return f"{option}: {wanted!r} matches no module of the model ({hint})."
