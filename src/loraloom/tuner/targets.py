"""Names in a configuration that match nothing: an error instead of an adapter smaller than asked for."""

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from loraloom.tuner.peft_internals import BaseTunerLayer, expand_all_linear


def check_patterns(config: Any, model: nn.Module, is_target: Callable[[str], Any]) -> None:
    """Checks that every name in target_modules, and every key of a pattern, matches a module of the model.

    Args:
        config: a ``LoomConfig`` whose target_modules are set.
        model: the model to adapt; nothing is changed.
        is_target: PEFT's own test of a module name against the config.

    Raises:
        ValueError: something matches nothing; the message lists the nearest module names. With
            ``config.allow_unmatched`` it is a warning.
    """
    adapter_parts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(adapter_parts)]
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        expanded = copy.copy(config)
        expand_all_linear(expanded, model)
        targets = sorted(expanded.target_modules)
    else:
        targets = [name for name in names if is_target(name)]

    problems = []
    if isinstance(config.target_modules, str):
        if not targets:
            problems.append(_problem("target_modules", config.target_modules, names, targets))
    else:
        for wanted in sorted(config.target_modules or ()):
            if not any(name == wanted or name.endswith(f".{wanted}") for name in targets):
                problems.append(_problem("target_modules", wanted, names, targets))
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                problems.append(_problem(option, pattern, targets, targets))
    if problems and config.allow_unmatched:
        warnings.warn(" ".join(problems), RuntimeWarning, stacklevel=2)
    elif problems:
        raise ValueError(" ".join(problems) + " Correct the names, or pass allow_unmatched=True to go on without them.")


def _problem(option: str, wanted: str, names: Iterable[str], targets: list[str]) -> str:
    names = list(names)
    if any(name == wanted or name.endswith(f".{wanted}") for name in names) and option == "target_modules":
        return f"{option}: {wanted!r} names only modules that the other options (exclude_modules, ...) leave out."
    endings = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    near = difflib.get_close_matches(re.split(r"[^\w]", wanted)[-1], sorted(endings), n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"the model has: {', '.join(sorted(endings)[:12])}"
    return f"{option}: {wanted!r} matches no module of the model ({hint})."
