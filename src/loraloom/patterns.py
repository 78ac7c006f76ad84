"""Names and expressions of a configuration against the names of modules, by PEFT's rules and within a time limit.

A configuration may come from anyone's file, and an expression of :mod:`re` may take for ever. The `regex` package reads
the same expressions and gives up in time.
"""

from collections.abc import Collection
from functools import cache
from typing import Any

import regex

from loraloom.errors import InputError

_SECONDS = 0.5  # for one match of an expression
_LONGEST = 20_000  # characters of an expression that is compiled


def matches(expression: str, name: str, shown: str | None = None, *, whole: bool = False) -> "regex.Match | None":
    """Matches an expression that a file brings, at the start of a name or with all of it, within a second.

    Args:
        expression: of :mod:`re`.
        name: the text.
        shown: how a message names the expression; None: as it is.
        whole: match all of the name.

    Raises:
        InputError: it is no expression ("bad-pattern"), or it takes too long ("slow-pattern").
    """
    shown = _short(expression if shown is None else shown)
    try:
        compiled = _compiled(expression)
        match = compiled.fullmatch if whole else compiled.match
        return match(name, timeout=_SECONDS)
    except TimeoutError:
        raise InputError(
            f"the expression {shown} takes more than {_SECONDS:g} s to match {_short(name)}: simplify it",
            code="slow-pattern",
        ) from None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(f"{shown} is no regular expression: {error}", code="bad-pattern") from None


def pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the whole name, or its ending after a dot.

    Raises:
        InputError: a key is no expression, or takes too long.
    """
    for key, value in (pattern or {}).items():
        if matches(rf"(.*\.)?({key})$", module, key):
            return value
    return default


def is_target(
    name: str,
    target_modules: Collection[str] | str | None,
    exclude_modules: Collection[str] | str | None = None,
    modules_to_save: Collection[str] | None = None,
    layers_to_transform: Collection[int] | int | None = None,
    layers_pattern: Collection[str] | str | None = None,
) -> bool | None:
    """Whether PEFT would adapt a module, by its rules for names and layer indices; None: it is left out on purpose.

    Raises:
        InputError: an expression is none, or takes too long.
    """
    if isinstance(exclude_modules, str):
        if exclude_modules and matches(exclude_modules, name, whole=True):
            return None
    elif exclude_modules and any(ends_with(name, excluded) for excluded in exclude_modules):
        return None
    if any(matches(rf"(^|.*\.){saved}($|\..*)", name, saved) for saved in modules_to_save or ()):
        return None
    if target_modules is None:
        return False
    if isinstance(target_modules, str):
        return matches(target_modules, name, whole=True) is not None
    if name in target_modules:  # whatever its layer
        return True
    if not any(ends_with(name, target) for target in target_modules):
        return False
    if layers_to_transform is None or layers_to_transform == []:
        return True
    index = _layer_of(name, layers_pattern)
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    return index is not None and index in layers


def ends_with(module: str, name: str) -> bool:
    """Whether a name is the module's, or its ending after a dot."""
    return module == name or module.endswith(f".{name}")


def _layer_of(name: str, layers_pattern: Collection[str] | str | None) -> int | None:
    """The index of the layer, behind the first name that one of the patterns matches, or behind any."""
    if not layers_pattern:
        match = matches(r".*?\.[^.]*\.(\d+)\.", name)
        return None if match is None else int(match[1])
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        if match := matches(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name, pattern):
            return int(match["idx"])
    return None


@cache
def _compiled(expression: str) -> "regex.Pattern":
    if len(expression) > _LONGEST:
        raise OverflowError(f"it has {len(expression)} characters")
    return regex.compile(expression)


def _short(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 120 else f"{text[:117]}..."
