"""Experts of mixtures (``target_parameters``) on disk: each expert's matrix of a parameter is a module of its own.

A parameter holds E matrices W_e (out, in) and has the update ``D_e = g s B_e M_e A_e``. PEFT stores A (E r, in) expert
by expert and B (out, r E) with the expert as the fastest index (peft 0.21, tuners/lora/layer.py, ParamWrapper). It
wraps the module once per parameter, in the order in which the module defines them: the first one is the innermost and
lies under ``base_layer``. The names of the parameters stand in the configuration alone.

The base model stores a parameter as it is, as (E, out, in) or (E, in, out), or each expert's projections apart.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.io.checkpoint import Checkpoint

# How many experts' rows lie in what a part stores; the others are one for all experts.
_BY_EXPERT = ("A", "mixer")
# Where one module has several parameters: the order in which transformers' experts define them.
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# A parameter -> the names under which checkpoints store an expert's projections, which it holds one after the other.
_APART = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}
# transformers' models whose parameters are (E, in, out); "is_transposed" in their classes.
_TRANSPOSED = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
_EXPERT = re.compile(r"(?P<layer>.*)\.[^.]+\.experts\.(?P<expert>\d+)\.(?P<name>[^.]+)\.weight")


@dataclass(frozen=True)
class Expert:
    """One expert's matrix of a parameter.

    Attributes:
        parameter: its full name, "model.layers.0.mlp.experts.gate_up_proj".
        index: of the expert.
        count: of experts.
    """

    parameter: str
    index: int
    count: int

    @property
    def name(self) -> str:
        """As a module: "model.layers.0.mlp.experts.3.gate_up_proj"."""
        place, _, name = self.parameter.rpartition(".")
        return self.parameter if self.count == 1 else f"{place}.{self.index}.{name}"

    def shape(self, part: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this expert's share of a stored part."""
        if part in _BY_EXPERT:
            return stored[0] // self.count, *stored[1:]
        return (stored[0], stored[1] // self.count) if part == "B" else stored

    def share(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This expert's share of stored parts."""
        shares = dict(parts)
        for part in _BY_EXPERT:
            if part in parts:
                shares[part] = parts[part].unflatten(0, (self.count, -1))[self.index]
        shares["B"] = parts["B"].unflatten(1, (-1, self.count))[..., self.index]
        return shares


def joined(shares: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The experts' factors A_e (r, in) and B_e (out, r) as they are stored: A (E r, in), B (out, r E)."""
    As, Bs = zip(*shares, strict=True)
    return torch.cat(As), torch.stack(Bs, dim=2).flatten(1)


def wrapped_parameters(config: Mapping[str, Any], modules: Iterable[str], where: str) -> dict[str, str]:
    """Which parameter the factors of a module are of, by the module's name in the file; ordinary modules are left out.

    Raises:
        InputError: a file has more or fewer factors than ``target_parameters`` names, or its order does not tell which
            factors are whose ("experts").
    """
    targets = config.get("target_parameters") or []
    levels: dict[str, list[str]] = {}
    for module in modules if targets else ():
        levels.setdefault(".".join(part for part in module.split(".") if part != "base_layer"), []).append(module)
    found: dict[str, str] = {}
    for module, wrappers in levels.items():
        last = {target.rpartition(".")[2] for target in targets}
        names = [name for name in last if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]
        if not names:
            continue
        unknown = sorted(set(names) - set(_ORDER))
        if unknown and len(names) > 1:
            raise InputError(
                f"{where}: {module} has the factors of several parameters, and the order of {', '.join(unknown)} among "
                "them is not in the file: save an adapter for each",
                code="experts",
            )
        names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else 0)
        wrappers.sort(key=len, reverse=True)  # the innermost has the most base_layers in its name
        if len(names) != len(wrappers):
            raise InputError(
                f"{where}: {module} has the factors of {len(wrappers)} parameters, target_parameters names "
                f"{len(names)} ({', '.join(names)}): save the adapter again",
                code="experts",
            )
        found |= {wrapper: f"{module}.{name}" for wrapper, name in zip(wrappers, names, strict=True)}
    for target in targets:
        if not any(f".{parameter}".endswith(f".{target}") for parameter in found.values()):
            raise InputError(f"{where}: target_parameters names {target!r}, which has no factors there", code="experts")
    return found


@dataclass(frozen=True)
class Place:
    """Where rows of an expert's matrix lie in a base checkpoint.

    Attributes:
        key: of the tensor.
        start, stop: rows of W_e (out, in) that it holds.
        index: of the expert, in a tensor that holds all of them; None in one of its own.
        transposed: the tensor holds W_e^T.
    """

    key: str
    start: int
    stop: int
    index: int | None
    transposed: bool

    def read(self, base: Checkpoint) -> Tensor:
        """The rows."""
        stored = base.tensor(self.key) if self.index is None else base.rows(self.key, self.index, self.index + 1)[0]
        return stored.T if self.transposed else stored


class ExpertPlaces:
    """Finds experts' matrices in a base checkpoint.

    Args:
        base: the checkpoint.
        config: its config.json, {} where there is none.
    """

    def __init__(self, base: Checkpoint, config: Mapping[str, Any]) -> None:
        self._base = base
        self._transposed = config.get("model_type") in _TRANSPOSED
        # (layer, expert, projection) -> tensor; a layer with and without the name of the model's body.
        self._apart: dict[tuple[str, int, str], str] = {}
        for key in base:
            if match := _EXPERT.fullmatch(key):
                layer, expert, name = match["layer"], int(match["expert"]), match["name"]
                self._apart[layer, expert, name] = self._apart[_body(layer), expert, name] = key

    def keys(self, expert: Expert) -> list[str]:
        """The tensors that hold the matrix, first rows first; [] where the base does not have it."""
        if (key := self._whole(expert.parameter)) is not None:
            return [key]
        module, _, name = expert.parameter.rpartition(".")
        layer = module.removesuffix(".experts").rpartition(".")[0]
        for names in _APART.get(name, ()):
            keys = [
                self._apart.get((layer, expert.index, part)) or self._apart.get((_body(layer), expert.index, part))
                for part in names
            ]
            if None not in keys:
                return [key for key in keys if key is not None]
        return []

    def of(self, expert: Expert, shape: tuple[int, int]) -> list[Place]:
        """Where the matrix (out, in) lies, first rows first.

        Raises:
            InputError: the base has it in another shape ("other-base").
        """
        if self._whole(expert.parameter) is not None:
            return [self._in_parameter(self.keys(expert)[0], expert, shape)]
        return self._one_after_the_other(self.keys(expert), expert, shape)

    def _whole(self, parameter: str) -> str | None:
        names = (parameter, _body(parameter), f"model.{parameter}")
        return next((name for name in names if name in self._base), None)

    def _in_parameter(self, key: str, expert: Expert, shape: tuple[int, int]) -> Place:
        stored = self._base.shape(key)
        count, matrix = (stored[0], stored[1:]) if len(stored) == 3 else (1, stored)
        if count != expert.count or matrix not in (shape, shape[::-1]):
            raise _other_base(expert, shape, key, stored)
        transposed = matrix != shape or (self._transposed and shape[0] == shape[1])
        return Place(key, 0, shape[0], expert.index if len(stored) == 3 else None, transposed)

    def _one_after_the_other(self, keys: list[str], expert: Expert, shape: tuple[int, int]) -> list[Place]:
        places, start = [], 0
        for key in keys:
            stored = self._base.shape(key)
            if len(stored) != 2 or stored[1] != shape[1]:
                raise _other_base(expert, shape, key, stored)
            places.append(Place(key, start, start + stored[0], None, False))
            start += stored[0]
        if start != shape[0]:
            raise _other_base(expert, shape, keys[-1], self._base.shape(keys[-1]))
        return places


def _body(name: str) -> str:
    """A name without its first component."""
    return name.partition(".")[2]


def _other_base(expert: Expert, shape: tuple[int, int], key: str, stored: tuple[int, ...]) -> InputError:
    return InputError(
        f"{expert.name}: the update is {shape[0]} x {shape[1]} for {expert.count} experts, {key} of the base "
        f"{'x'.join(map(str, stored))}; the adapter belongs to another base model",
        code="other-base",
    )
