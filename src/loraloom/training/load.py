"""From RUN.yaml and `--section.key value` to a RunConfig, strictly: what is not understood is an error, in one line."""

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from loraloom.annotations import choices, describe, matches, options
from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.check import check_combinations
from loraloom.training.config import (
    SECTIONS,
    TRAINING_DEFAULTS,
    Method,
    RunConfig,
)

SECTION_NAMES = tuple(f.name for f in dataclasses.fields(RunConfig))


class _Loader(yaml.SafeLoader):
    """YAML with three of its traps removed: `1e-4` is a number, `no` is a word, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# The booleans of YAML 1.2: `save_strategy: no` means the word, as it does in the documentation of transformers.
_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(
    path: Path | None, overrides: Sequence[tuple[str, str]] = (), method: Method | None = None
) -> RunConfig:
    """Read RUN.yaml, apply overrides, and fill in the defaults.

    Args:
        path: the file, or None for the defaults alone.
        overrides: (`section.key`, value as YAML text), later ones win.
        method: the default of method.name, where it is not the usual one.

    Raises:
        InputError: no such file, not YAML, an unknown section or key, a value of the wrong type, or keys that
            contradict each other.
    """
    sections = read_sections(path, SECTION_NAMES, overrides)
    if method:
        sections["method"].setdefault("name", method)
    return build_config(sections)


def read_sections(
    path: Path | None, names: Sequence[str], overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, dict[str, Any]]:
    """The sections `names` of a YAML file, empty where the file has none, with the overrides applied.

    Args:
        path: the file, or None for empty sections.
        names: the sections that the file may have.
        overrides: (`section.key`, value as YAML text), later ones win.

    Raises:
        InputError: no such file, not YAML, an unknown section, or a section that does not hold keys and values.
    """
    raw = _read(path, names) if path else {}
    for name in raw:
        if name not in names:
            raise InputError(
                f"{path}: unknown section {name!r}{_home_of(name) or did_you_mean(name, names)}", code="unknown-section"
            )
    sections: dict[str, dict[str, Any]] = {}
    for name in names:
        section = raw.get(name) or {}
        if not isinstance(section, dict):
            raise InputError(
                f"{path}: section {name!r} holds {section!r}; expected keys and values", code="not-sections"
            )
        sections[name] = dict(section)
    for key, text in overrides:
        section_name, _, rest = key.partition(".")
        if section_name not in names or not rest:
            hint = did_you_mean(section_name, names)
            raise InputError(
                f"--{key}: expected --section.key with a section of {', '.join(names)}{hint}", code="unknown-section"
            )
        sections[section_name][rest] = _override_value(section_name, rest, text)
    return sections


def build_config(sections: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The run that RUN.yaml's sections describe, with the defaults filled in; a section may be missing.

    Raises:
        InputError: an unknown key, a value of the wrong type, or keys that contradict each other.
    """
    config = RunConfig(
        training={**TRAINING_DEFAULTS, **sections.get("training", {})},
        **{name: build_section(cls, name, sections.get(name, {})) for name, cls in SECTIONS.items()},
    )
    check_combinations(config)
    return config


def build_section(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls` from the keys and values of the section `name`.

    Raises:
        InputError: an unknown key, or a value that is not of the field's type.
    """
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(name, key, list(hints))
        if not matches(value, hints[key]):
            near = did_you_mean(value, choices(hints[key])) if isinstance(value, str) else ""
            if bool in options(hints[key]) and str(value).lower() in ("yes", "no", "on", "off"):
                near = "; write true or false"
            raise InputError(f"{name}.{key}: {value!r} is not {describe(hints[key])}{near}", code="option-value")
    return cls(**values)


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back as an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def unknown_key(section: str, key: str, known: Sequence[str]) -> InputError:
    """The error for a key that `section` does not have: where it belongs if anywhere, else the nearest key."""
    # A mere slip is answered at once; `_home_of` may have to load the library that knows the keys of `training`.
    hint = did_you_mean(key, known, cutoff=0.85) or _home_of(key, section) or did_you_mean(key, known)
    hint = hint or f"; expected one of {', '.join(known)}"
    return InputError(f"unknown key {section}.{key}{hint}", code="unknown-key")


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        here = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file{did_you_mean(path.name, here)}", code="no-file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}", code="yaml") from None
    if not isinstance(raw, dict | None):
        raise InputError(
            f"{path}: holds a {type(raw).__name__}; expected sections {', '.join(names)}", code="not-sections"
        )
    return raw or {}


def _override_value(section: str, key: str, text: str) -> Any:
    """The override's text as YAML, or as it is where the key is a string and the text reads as something else."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    hint = get_type_hints(SECTIONS[section]).get(key) if section in SECTIONS else None
    return text if hint and not matches(value, hint) and matches(text, hint) else value


def _home_of(key: str, section: str = "") -> str:
    """`; it belongs to section ...` for a key that another section has, else nothing."""
    homes = [name for name, cls in SECTIONS.items() if key in {f.name for f in dataclasses.fields(cls)}]
    # Loads torch, but only on the way to an error that would otherwise leave the reader to search.
    if not homes and key in {f.name for f in dataclasses.fields(importlib.import_module("trl").SFTConfig)}:
        homes = ["training"]
    homes = [name for name in homes if name != section]
    return f"; it belongs to section {' or '.join(map(repr, homes))}" if homes else ""
