"""The section `optimizer` of RUN.yaml, made of the options of every optimizer. Imports no torch."""

import ast
import inspect
import types
from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from loraloom.optim import options
from loraloom.optim.options import GroupOptions
from loraloom.optim.registry import INNER, OPTIMIZERS

_SUMMARY = "What moves the weights. The rate is training.learning_rate; its scheduler multiplies every rate here."


def optimizer_section() -> type:
    """A dataclass with `name` and every option of every optimizer, each with its help and its defaults.

    The options of `GroupOptions` have their values as defaults. An optimizer's own are None, "as the optimizer has it":
    two optimizers may differ in it.
    """
    helps = help_texts()
    name = f"One of {', '.join(OPTIMIZERS)}; see docs/optimizers.md. Default: weight_adam for weightlora, else adamw."
    keys: list[tuple[str, Any, Any]] = [("name", Literal[tuple(OPTIMIZERS)] | None, field(default=None))]
    texts = {"name": name}
    hints = get_type_hints(GroupOptions)
    for f in fields(GroupOptions):
        keys.append((f.name, in_yaml(hints[f.name]), field(default=f.default)))
        texts[f.name] = helps[f.name]
    for key, (hint, defaults) in _own_options().items():
        keys.append((key, in_yaml(hint) | None, field(default=None)))
        texts[key] = f"{', '.join(dict.fromkeys(defaults))}: {helps[key]}{_default(defaults)}"
    doc = "".join(f"    {key}: {text}\n" for key, text in texts.items())
    namespace = {"__doc__": f"{_SUMMARY}\n\nArgs:\n{doc}", "__module__": __name__}
    return make_dataclass("OptimizerSection", keys, namespace=namespace)


def help_texts() -> dict[str, str]:
    """The help of each option: the text under its field, where it is first defined."""
    texts: dict[str, str] = {}
    for cls in ast.parse(inspect.getsource(options)).body:
        if isinstance(cls, ast.ClassDef):
            for statement, after in pairwise(cls.body):
                if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                    name = statement.target.id  # type: ignore[union-attr]
                    texts.setdefault(name, " ".join(after.value.value.split()))  # type: ignore[attr-defined]
    return texts


def in_yaml(hint: Any) -> Any:
    """An annotation as what YAML can hold: an integer is a number too, a tuple is a list."""
    if hint is float:
        return int | float
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(in_yaml(option) for option in get_args(hint))]  # noqa: UP007
    if get_origin(hint) is tuple:
        return list[in_yaml(get_args(hint)[0])]  # type: ignore[misc]
    return hint


def _own_options() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each option of an optimizer: its annotation, and its default by the name of the optimizer."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    inner = {f"inner {name}": choice for name, choice in INNER.items() if name not in OPTIMIZERS}
    for name, choice in {**OPTIMIZERS, **inner}.items():
        hints, defaults = get_type_hints(choice.options), choice.options()
        for key in hints:
            found.setdefault(key, (hints[key], {}))[1][name] = getattr(defaults, key)
    return found


def _default(defaults: dict[str, Any]) -> str:
    """` Default: 0.25; 1.0 for apollo.`, or nothing where it is None or empty and the help says what that means."""
    values = list(defaults.values())
    if all(value is None or value == {} for value in values):
        return ""
    usual = max(values, key=values.count)
    others: Iterator[str] = (f"; {value} for {name}" for name, value in defaults.items() if value != usual)
    return f" Default: {usual}{''.join(others)}."
