"""From RUN.yaml and `--section.key value` to a RunConfig, strictly: what is not understood is an error, in one line."""

import dataclasses
import importlib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from loraloom.errors import InputError, did_you_mean
from loraloom.optim.options import ProjectionOptions
from loraloom.optim.registry import OPTIMIZERS
from loraloom.training.config import (
    COMPOSITION,
    EXPANSION_KEYS,
    METHODS_WITH_SELECTION,
    METHODS_WITHOUT_ADAPTER,
    OPTIMIZER_KEYS_OF_TRAINING,
    SECTIONS,
    SELECTION_KEYS,
    TRAINING_DEFAULTS,
    CompositionSection,
    Method,
    MethodSection,
    OptimizerSection,
    RunConfig,
)

SECTION_NAMES = tuple(f.name for f in dataclasses.fields(RunConfig))


class _Loader(yaml.SafeLoader):
    """YAML with two of its traps removed: `1e-4` is a number here, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


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
            raise InputError(f"{path}: unknown section {name!r}{_home_of(name) or did_you_mean(name, names)}")
    sections: dict[str, dict[str, Any]] = {}
    for name in names:
        section = raw.get(name) or {}
        if not isinstance(section, dict):
            raise InputError(f"{path}: section {name!r} holds {section!r}; expected keys and values")
        sections[name] = dict(section)
    for key, text in overrides:
        section_name, _, rest = key.partition(".")
        if section_name not in names or not rest:
            hint = did_you_mean(section_name, names)
            raise InputError(f"--{key}: expected --section.key with a section of {', '.join(names)}{hint}")
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
    _check_combinations(config)
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
        if not _matches(value, hints[key]):
            near = did_you_mean(value, _choices(hints[key])) if isinstance(value, str) else ""
            raise InputError(f"{name}.{key}: {value!r} is not {_describe(hints[key])}{near}")
    return cls(**values)


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back as an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def unknown_key(section: str, key: str, known: Sequence[str]) -> InputError:
    """The error for a key that `section` does not have: where it belongs if anywhere, else the nearest key."""
    # A mere slip is answered at once; `_home_of` may have to load the library that knows the keys of `training`.
    hint = did_you_mean(key, known, cutoff=0.85) or _home_of(key, section) or did_you_mean(key, known)
    hint = hint or f"; expected one of {', '.join(known)}"
    return InputError(f"unknown key {section}.{key}{hint}")


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        here = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file{did_you_mean(path.name, here)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict | None):
        raise InputError(f"{path}: holds a {type(raw).__name__}; expected sections {', '.join(names)}")
    return raw or {}


def _override_value(section: str, key: str, text: str) -> Any:
    """The override's text as YAML, or as it is where the key is a string and the text reads as something else."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    hint = get_type_hints(SECTIONS[section]).get(key) if section in SECTIONS else None
    return text if hint and not _matches(value, hint) and _matches(text, hint) else value


def _home_of(key: str, section: str = "") -> str:
    """`; it belongs to section ...` for a key that another section has, else nothing."""
    homes = [name for name, cls in SECTIONS.items() if key in {f.name for f in dataclasses.fields(cls)}]
    # Loads torch, but only on the way to an error that would otherwise leave the reader to search.
    if not homes and key in {f.name for f in dataclasses.fields(importlib.import_module("trl").SFTConfig)}:
        homes = ["training"]
    homes = [name for name in homes if name != section]
    return f"; it belongs to section {' or '.join(map(repr, homes))}" if homes else ""


def _check_combinations(config: RunConfig) -> None:
    method, model = config.method, config.model
    if method.name in (*METHODS_WITHOUT_ADAPTER, COMPOSITION):
        default = MethodSection(name=method.name)
        for f in dataclasses.fields(method):
            if getattr(method, f.name) != getattr(default, f.name):
                raise InputError(f"method.{f.name} has no meaning for method.name {method.name!r}: remove it")
        if model.quantization != "none" and method.name == "full":
            raise InputError(f"method.name 'full' cannot train weights in {model.quantization}: use 'lora' or 'none'")
    if model.task == "causal-lm" and method.name == "probe":
        raise InputError("method.name 'probe' trains a classification head: set model.task to text-classification")
    if model.task == "causal-lm" and model.name == "builtin:minilm":
        raise InputError("model.name 'builtin:minilm' is an encoder: name a causal language model for task causal-lm")
    for key, owner in {"output_dir": "output.dir", "resume_from_checkpoint": "--resume"}.items():
        if key in config.training:
            raise InputError(f"training.{key} is set by loraloom: use {owner}")
    _check_composition(config)
    _check_selection(method, config.training)
    _check_optimizer(config)
    if not 0 < config.data.test_fraction < 1:
        raise InputError(f"data.test_fraction: {config.data.test_fraction} is not between 0 and 1")


def _check_composition(config: RunConfig) -> None:
    composition, name = config.composition, config.method.name
    if name != COMPOSITION:
        if composition != CompositionSection():
            raise InputError(
                f"section 'composition' needs method.name {COMPOSITION!r}, not {name!r}: remove method.name, and use "
                "loraloom compose"
            )
        return
    if not composition.members:
        raise InputError("composition.members is empty: give each adapter a name and its folder")
    if composition.weights != "learned":
        for key in ("scope", "constraint", "normalize"):
            if (value := getattr(composition, key)) != getattr(CompositionSection, key):
                raise InputError(
                    f"composition.{key} {value!r} has no meaning for weights {composition.weights!r}, which do not "
                    "train: remove it"
                )


def _check_selection(method: MethodSection, training: Mapping[str, Any]) -> None:
    for keys, owners in ((SELECTION_KEYS, METHODS_WITH_SELECTION), (EXPANSION_KEYS, ("weightlora+",))):
        for key in keys:
            if getattr(method, key) is not None and method.name not in owners:
                raise InputError(
                    f"method.{key} has no meaning for method.name {method.name!r}: remove it, or use {owners[0]!r}"
                )
    if method.expand_parameters is not None and (method.expand_times, method.expand_every) != (None, None):
        raise InputError(
            f"method.expand_parameters {method.expand_parameters} expands once: remove expand_times and expand_every"
        )
    if method.name in METHODS_WITH_SELECTION and training.get("load_best_model_at_end"):
        raise InputError(
            f"training.load_best_model_at_end cannot be used with method.name {method.name!r}, whose best checkpoint "
            "may have other adapters than the model at the end: set it to false"
        )


def _check_optimizer(config: RunConfig) -> None:
    """Two places can describe the optimizer; each key is honoured where it stands, or an error."""
    optimizer, method, training = config.optimizer, config.method, config.training
    if "optim" in training:
        if optimizer != OptimizerSection():
            raise InputError(
                f"training.optim {training['optim']!r} is an optimizer of transformers, which does not read the "
                "section optimizer: remove one of them"
            )
        if method.name in METHODS_WITH_SELECTION:
            raise InputError(
                f"training.optim {training['optim']!r} cannot select: remove it, {method.name!r} uses weight_adam"
            )
    else:
        for key, owner in OPTIMIZER_KEYS_OF_TRAINING.items():
            if key in training:
                raise InputError(f"training.{key} is read by the optimizers of training.optim alone: use {owner}")
    if method.name in METHODS_WITH_SELECTION and optimizer.name not in (None, "weight_adam"):
        raise InputError(
            f"optimizer.name {optimizer.name!r} cannot select adapters: method.name {method.name!r} needs 'weight_adam'"
        )
    if optimizer.name and issubclass(OPTIMIZERS[optimizer.name].options, ProjectionOptions) and method.name != "full":
        raise InputError(
            f"optimizer.name {optimizer.name!r} is for whole weights, method.name {method.name!r} trains small "
            "matrices: set method.name to 'full', or optimizer.name to 'adamw'"
        )
    if optimizer.betas is not None and len(optimizer.betas) != 2:
        raise InputError(f"optimizer.betas: {optimizer.betas} is not two numbers, such as [0.9, 0.999]")


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value from YAML has the annotated type; true and false are no numbers, an integer is a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _matches(key, arguments[0]) and _matches(item, arguments[1]) for key, item in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _options(hint: Any) -> Iterator[Any]:
    """The members of a union, or the annotation itself."""
    yield from get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    """The words that an annotation allows."""
    literals = [option for option in _options(hint) if get_origin(option) is Literal]
    return [choice for literal in literals for choice in get_args(literal) if isinstance(choice, str)]


def _describe(hint: Any) -> str:
    """An annotation in words: `an int or a list of int`."""
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words += [repr(choice) for choice in get_args(option)]
        elif option is types.NoneType:
            words.append("null")
        else:
            words.append(option.__name__ if get_origin(option) is None else str(option))
    return " or ".join(words)
