"""Annotations of a dataclass's fields: whether a value from YAML fits, and what they say in words."""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin


def matches(value: Any, hint: Any) -> bool:
    """Whether a value from YAML has the annotated type; true and false are no numbers, an integer is a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            matches(key, arguments[0]) and matches(item, arguments[1]) for key, item in value.items()
        )
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def options(hint: Any) -> Iterator[Any]:
    """The members of a union, or the annotation itself."""
    yield from get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def choices(hint: Any) -> list[str]:
    """The words that an annotation allows."""
    literals = [option for option in options(hint) if get_origin(option) is Literal]
    return [choice for literal in literals for choice in get_args(literal) if isinstance(choice, str)]


def describe(hint: Any) -> str:
    """An annotation in words: `an int or a list of int`."""
    words = []
    for option in options(hint):
        if get_origin(option) is Literal:
            words += [repr(choice) for choice in get_args(option)]
        elif option is types.NoneType:
            words.append("null")
        else:
            words.append(option.__name__ if get_origin(option) is None else str(option))
    return " or ".join(words)
