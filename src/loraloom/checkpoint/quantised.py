"""Base checkpoints that bitsandbytes has quantised, read as the floating-point weights that they stand for.

On disk a 4-bit weight is a column of bytes with ``absmax``, ``quant_map`` and a JSON ``quant_state`` beside it, an
8-bit weight an int8 matrix with one scale ``SCB`` per row: W = weight * SCB / 127.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.checkpoint.io import Checkpoint
from loraloom.errors import InputError

_STATE = ".quant_state.bitsandbytes__"


def quantisation(config: dict[str, Any], base: Checkpoint) -> str | None:
    """The name of the method that the base model is quantised with, None when it is not.

    Args:
        config: the base model's config.json.
        base: its weights.
    """
    if any(_STATE in key or key.endswith(".SCB") for key in base):
        return "bitsandbytes"
    method = (config.get("quantization_config") or {}).get("quant_method")
    return None if method is None else str(method)


class DequantisedCheckpoint(Checkpoint):
    """A bitsandbytes checkpoint that shows its quantised weights as bfloat16 and reads them as float32.

    The tensors that belong to the quantisation are not shown. One dequantised weight is kept in memory at a time.

    Raises:
        InputError: bitsandbytes is not installed.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(path, files)
        try:
            import bitsandbytes  # noqa: F401  (takes seconds to import, and is optional)
        except ImportError:
            raise InputError(
                f"{path} is quantised by bitsandbytes, which is not installed: pip install bitsandbytes"
            ) from None
        self._stored = Checkpoint(path, files)
        # The weight -> what belongs to it.
        self._parts: dict[str, list[str]] = {}
        for key in self._stored:
            if _STATE in key:
                weight = key.partition(_STATE)[0]
                self._parts[weight] = [other for other in self._stored if other.startswith(f"{weight}.")]
            elif key.endswith(".SCB"):
                module = key.removesuffix(".SCB")
                parts = (key, f"{module}.weight_format")
                self._parts[f"{module}.weight"] = [part for part in parts if part in self._stored]
        hidden = {part for parts in self._parts.values() for part in parts}
        self.files = {file: [key for key in keys if key not in hidden] for file, keys in self.files.items()}
        self._file_of = {key: file for key, file in self._file_of.items() if key not in hidden}
        self._shapes = {key: self._dequantised_shape(key) for key in self._parts}
        self._latest: tuple[str, Tensor] | None = None

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes.get(key) or super().shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.bfloat16 if key in self._parts else super().dtype(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        if key not in self._parts:
            return super().rows(key, start, stop)
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # before the next one is made
            self._latest = key, self._dequantised(key)
        return self._latest[1][start:stop]

    def _state(self, weight: str) -> dict[str, Tensor]:
        return dict(self._stored.tensors(self._parts[weight]))

    def _dequantised_shape(self, weight: str) -> tuple[int, ...]:
        state = next((key for key in self._parts[weight] if _STATE in key), None)
        if state is None:
            return self._stored.shape(weight)
        return tuple(json.loads(bytes(self._stored.tensor(state).tolist()))["shape"])

    def _dequantised(self, weight: str) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        stored, state = self._stored.tensor(weight), self._state(weight)
        scales = state.get(f"{weight.removesuffix('.weight')}.SCB")
        if scales is not None:
            return stored * (scales[:, None] / 127)
        packed = QuantState.from_dict(state, device=torch.device("cpu"))
        packed.dtype = torch.float32
        return dequantize_4bit(stored, packed).reshape(self._shapes[weight])
