"""What users have in their scripts and files: flags, keys, names. A change of it is made on purpose, or not at all.

After a change on purpose: `python tests/test_public_surface.py` writes tests/public_surface.txt anew; read its diff.
"""

import dataclasses
import importlib
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

import loraloom
from loraloom import LoomConfig
from loraloom.cli.main import VERBS
from loraloom.cli.options import Output
from loraloom.training.compare.config import CompareSection
from loraloom.training.config import SECTIONS, TRAINING_DEFAULTS, TRAINING_KEYS
from loraloom.training.metrics import DEFAULTS, METRICS

SNAPSHOT = Path(__file__).with_name("public_surface.txt")


def flags(verb: str) -> list[str]:
    """The options of the verb, from the dataclass that its file parses them into; positional ones without `--`."""
    module = importlib.import_module(f"loraloom.cli.{verb}")
    commands = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Output)]
    (command,) = [cls for cls in commands if cls.__module__ == module.__name__]
    return [*_flags("", command)]


def _flags(prefix: str, cls: type) -> Iterator[str]:
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _flags(f"{prefix}{name}.", hint)
        else:
            yield f"{prefix}{name}" if get_origin(hint) is Annotated else f"--{prefix}{name}"


def keys(prefix: str, cls: type, without: type | None = None) -> Iterator[str]:
    """The fields of a dataclass with type and default, without those of another."""
    inherited = {f.name for f in dataclasses.fields(without)} if without else set()
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in inherited:
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        yield f"{prefix}{field.name}: {kind(hints[field.name])} = {default!r}"


def kind(hint: Any) -> str:
    """A type in the same words under every Python."""
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(kind, get_args(hint)))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    return "None" if hint is types.NoneType else hint.__name__ if get_origin(hint) is None else str(hint)


def packages() -> Iterator[tuple[str, list[str]]]:
    """loraloom, and its packages and modules that say what is public in them."""
    yield "loraloom", sorted(loraloom.__all__)
    for module in pkgutil.walk_packages(loraloom.__path__, "loraloom."):
        if module.ispkg and (names := getattr(importlib.import_module(module.name), "__all__", None)):
            yield module.name, sorted(names)


def surface() -> str:
    """All of it, a line for each thing."""
    sections = {f"loraloom {verb}": flags(verb) for verb in VERBS}
    sections["RUN.yaml"] = [line for name, cls in SECTIONS.items() for line in keys(f"{name}.", cls)]
    sections["RUN.yaml, defaults of section training"] = [f"training.{k} = {v!r}" for k, v in TRAINING_DEFAULTS.items()]
    sections["RUN.yaml, own keys of section training"] = [f"training.{key}" for key in TRAINING_KEYS]
    sections["RUN.yaml, metrics by task"] = [
        f"{task}: {', '.join(name for name, metric in METRICS.items() if task in metric.tasks)}" for task in DEFAULTS
    ]
    sections["COMPARE.yaml"] = [*keys("compare.", CompareSection)]
    sections["adapter_config.json, beside PEFT's own keys"] = [*keys("", LoomConfig, without=PeftConfig)]
    sections |= {f"from {module} import": names for module, names in packages()}
    return "\n".join(f"[{name}]\n" + "".join(f"{line}\n" for line in lines) for name, lines in sections.items())


def test_nothing_public_changes_unnoticed():
    assert surface() == SNAPSHOT.read_text(encoding="utf-8"), f"if on purpose: {__doc__.split('After ')[1]}"


if __name__ == "__main__":
    SNAPSHOT.write_text(surface(), encoding="utf-8")
