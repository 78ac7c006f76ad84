"""report.json: a `Report` as plain JSON and back, strictly. docs/report.md is its description.

The dataclasses of report/model.py are the schema: their fields are the keys, their annotations the types. A figure
says what it is by its `kind`.
"""

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from loraloom.errors import InputError, did_you_mean
from loraloom.report.model import Bars, Figure, Heatmap, Lines, Report, Scatter

SCHEMA_VERSION = 1
FIGURES: dict[str, type] = {"lines": Lines, "heatmap": Heatmap, "bars": Bars, "scatter": Scatter}


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON's own types, `schema_version` first.

    Raises:
        ValueError: a number is not finite; JSON has no NaN.
    """
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(report)}
    _refuse_non_finite(content, "report")
    return content


def from_dict(content: Any, source: str = "report.json") -> Report:
    """The report that `to_dict` made.

    Args:
        content: what a JSON reader gave.
        source: what to call it in an error.

    Raises:
        InputError: another schema version, a missing or unknown key, a value of the wrong type, or a figure that
            contradicts itself; one line that names the place.
    """
    if not isinstance(content, dict):
        raise InputError(f"{source}: holds a {type(content).__name__}; expected an object with the keys of a report")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{source}: schema_version is {version!r}, this loraloom reads {SCHEMA_VERSION}; write the report again"
        )
    return _read({key: value for key, value in content.items() if key != "schema_version"}, Report, source)


def load_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        InputError: no such file, not JSON, or not a report (see `from_dict`).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    return from_dict(content, str(path))


def _read(value: Any, hint: Any, place: str) -> Any:
    """`value` as the annotated type, or an InputError that names the place."""
    if hint == Figure:
        kind = value.get("kind") if isinstance(value, dict) else value
        if kind not in FIGURES:
            raise InputError(f"{place}: kind is {kind!r}; expected one of {', '.join(FIGURES)}")
        return _read(value, FIGURES[kind], place)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _read_union(value, arguments, place)
    if dataclasses.is_dataclass(hint):
        return _read_object(value, hint, place)
    if origin is list and isinstance(value, list):
        return [_read(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(item, arguments[1], f"{place}.{key}") for key, item in value.items()}
    plain = (int, float) if hint is float else (origin or hint)
    if not isinstance(value, plain) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{place}: {_short(value)} is not {_name(hint)}")
    return value


def _read_union(value: Any, options: tuple[Any, ...], place: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    if set(options) == set(get_args(Figure)):
        return _read(value, Figure, place)
    if len(options) == 1:
        return _read(value, options[0], place)
    if isinstance(value, bool) or not isinstance(value, options):
        names = " or ".join(_name(option) for option in options)
        raise InputError(f"{place}: {_short(value)} is not {names}")
    return value


def _read_object(value: Any, cls: Any, place: str) -> Any:
    hints = get_type_hints(cls)
    if not isinstance(value, dict):
        raise InputError(f"{place}: {_short(value)} is not an object")
    for key in value:
        if key not in hints:
            raise InputError(
                f"{place}: unknown key {key!r}{did_you_mean(key, hints) or '; expected ' + ', '.join(hints)}"
            )
    for field in dataclasses.fields(cls):
        has_default = not (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
        if field.name not in value and not has_default:
            raise InputError(f"{place}: key {field.name!r} is missing")
    values = {key: _read(item, hints[key], f"{place}.{key}") for key, item in value.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None


def _refuse_non_finite(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_non_finite(item, f"{place}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_non_finite(item, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}; a number that is missing or not finite is None")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; a missing number is null")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _name(hint: Any) -> str:
    names = {float: "a number", int: "an integer", str: "a string", bool: "true or false", list: "a list"}
    return names.get(get_origin(hint) or hint, "an object")
