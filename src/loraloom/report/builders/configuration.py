"""What a run was told: the keys that differ from their defaults, and all the others folded."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from loraloom.report.model import Cell, Section, Table
from loraloom.training.config import RunConfig

LONGEST = 120  # characters of a value


def configuration_section(config: RunConfig) -> Section:
    """The configuration of a run."""
    values, defaults = _flat(config), _flat(RunConfig())
    changed = {key: value for key, value in values.items() if value != defaults.get(key)}
    rest: list[list[Cell]] = [[key, _setting(value)] for key, value in values.items() if key not in changed]
    rows: list[list[Cell]] = [
        [key, _setting(value), _setting(defaults[key]) if key in defaults else "the trainer's"]
        for key, value in changed.items()
    ]
    note = "The keys that differ from their defaults; resolved.yaml has all of them."
    folded = Table(["key", "value"], rest, f"The {len(rest)} keys that keep their defaults")
    return Section("Configuration", note, table=Table(["key", "value", "default"], rows), folded=folded)


def configurations_section(configs: Mapping[str, RunConfig], without: tuple[str, ...]) -> Section:
    """The configurations of several methods side by side: the keys that any of them changes.

    Args:
        configs: by method; at least one.
        without: keys that differ from run to run.
    """
    values = {label: _flat(config) for label, config in configs.items()}
    defaults = _flat(RunConfig())
    keys = [key for key in dict.fromkeys(key for flat in values.values() for key in flat) if key not in without]
    changed = [key for key in keys if any(flat.get(key) != defaults.get(key) for flat in values.values())]
    same = [key for key in changed if len({_setting(flat.get(key)) for flat in values.values()}) == 1]
    rows: list[list[Cell]] = [
        [key, *(_setting(flat.get(key)) for flat in values.values())] for key in changed if key not in same
    ]
    first = next(iter(values.values()))
    shared: list[list[Cell]] = [[key, _setting(first.get(key))] for key in same]
    folded = Table(["key", "value"], shared, f"The {len(same)} changed keys that all methods share")
    note = "Each method at its best point: the keys in which they differ."
    return Section("Configuration", note, table=Table(["key", *values], rows), folded=folded if shared else None)


def _flat(config: RunConfig) -> dict[str, Any]:
    """ "section.key" -> value."""
    sections = dataclasses.asdict(config)
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
