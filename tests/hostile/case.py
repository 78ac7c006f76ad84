"""One hostile folder, and what its families have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.originals import WEIGHTS

ADAPTERS = ("lora", "loom", "composition")
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """A folder to be made.

    Attributes:
        family: what is attacked.
        name: which attack; unique with the family and the original.
        of: the original: lora, loom, composition, base, sharded, run.
        build: changes a copy of it.
    """

    family: str
    name: str
    of: str
    build: Callable[[Path], Any]

    def __str__(self) -> str:
        return f"{self.family}/{self.of}/{self.name}"


def case(family: str, name: str, of: str, change: Callable[..., Any], file: str, *values: Any) -> Case:
    """A case in which ``change(file, *values)`` changes one file of the copy."""
    return Case(family, name, of, partial(_change, change, file, values))


def _change(change: Callable[..., Any], file: str, values: tuple, folder: Path) -> None:
    change(folder / file, *values)


def weights_of(of: str) -> str:
    """The file with the tensors of an original."""
    return WEIGHTS if of in ADAPTERS else MODEL
