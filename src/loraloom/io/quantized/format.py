"""What a format of quantised weights has to say: which stored tensors a weight is made of, and what it stands for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loraloom.io.checkpoint import Checkpoint


class Format(ABC):
    """One way of storing weights as codes and scales. It claims the weights that it recognises by their tensors.

    Args:
        stored: the checkpoint as it is on disk.
        config: ``quantization_config`` of the base's config.json, {} where there is none.

    Attributes:
        name: how messages call it.
        parts: weight that is shown -> the stored tensors that it is made of, its codes first.
    """

    name: str

    def __init__(self, stored: Checkpoint, config: Mapping[str, Any]) -> None:
        self.stored, self.config = stored, config
        self.parts = self.find()

    @abstractmethod
    def find(self) -> dict[str, list[str]]:
        """The weights that are stored in this format, see ``parts``."""

    @abstractmethod
    def shape(self, weight: str) -> tuple[int, ...]:
        """Shape of the weight, from headers alone where that is possible."""

    @abstractmethod
    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of the weight along its first dimension, in float32."""


class WholeFormat(Format):
    """A format in which rows do not lie together: the weight that was asked for last is kept."""

    def __init__(self, stored: Checkpoint, config: Mapping[str, Any]) -> None:
        super().__init__(stored, config)
        self._latest: tuple[str, Tensor] | None = None

    @abstractmethod
    def whole(self, weight: str) -> Tensor:
        """The weight in float32."""

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        if self._latest is None or self._latest[0] != weight:
            self._latest = None  # before the next one is made
            self._latest = weight, self.whole(weight)
        return self._latest[1][start:stop]


def with_parts(stored: Checkpoint, ending: str, *others: str) -> list[tuple[str, list[str]]]:
    """Tensors whose name has the ending, and those of the same stem with the others: (stem, [codes, others...])."""
    found = []
    for key in stored:
        stem = key.removesuffix(ending)
        parts = [key, *(stem + other for other in others)]
        if key.endswith(ending) and all(part in stored for part in parts):
            found.append((stem, parts))
    return found
