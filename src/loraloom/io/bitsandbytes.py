"""Base checkpoints that bitsandbytes has quantised, read as the floating-point weights that they stand for.

On disk a 4-bit weight is a column of bytes, two codes each, the first in the high half. Beside it are the codes' values
(``quant_map``), a scale per block of entries (``absmax``) and a JSON ``quant_state``; with double quantisation the
scales are codes as well: absmax = nested_quant_map[absmax] * nested_absmax + nested_offset (QLoRA 2305.14314, section
3). An 8-bit weight is an int8 matrix with a scale ``SCB`` per row: W = weight * SCB / 127.

Reading them takes a look-up and a product, and is done here by that definition: on the CPU, bitsandbytes' own
``dequantize_4bit`` (0.50) is off by 15% of an NF4 weight.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.io.checkpoint import Checkpoint

_STATE = ".quant_state.bitsandbytes__"
_CHUNK = 2**21  # codes; look-ups need eight bytes for each


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
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(path, files)
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

    def _dequantised_shape(self, weight: str) -> tuple[int, ...]:
        state = self._state(weight)
        return self._stored.shape(weight) if state is None else tuple(state["shape"])

    def _state(self, weight: str) -> dict[str, Any] | None:
        """The quant_state of a 4-bit weight."""
        key = next((part for part in self._parts[weight] if _STATE in part), None)
        return None if key is None else json.loads(bytes(self._stored.tensor(key).tolist()))

    def _dequantised(self, weight: str) -> Tensor:
        state = self._state(weight)
        stored = self._stored.tensor(weight)
        if state is None:
            return stored * (self._stored.tensor(f"{weight.removesuffix('.weight')}.SCB")[:, None] / 127)
        scales = self._stored.tensor(f"{weight}.absmax")
        if "nested_blocksize" in state:
            values, scale = (self._stored.tensor(f"{weight}.nested_{part}") for part in ("quant_map", "absmax"))
            scales = _look_up(scales, values, scale, state["nested_blocksize"]) + state["nested_offset"]
        values = self._stored.tensor(f"{weight}.quant_map")
        stored = stored.flatten().view(torch.uint8)  # bnb_4bit_quant_storage may be of another dtype
        result = torch.empty(2 * stored.numel())
        codes_at_once = _CHUNK // state["blocksize"] * state["blocksize"]
        for start in range(0, result.numel(), codes_at_once):
            packed = stored[start // 2 : (start + codes_at_once) // 2]
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
            here = scales[start // state["blocksize"] :]
            result[start : start + len(codes)] = _look_up(codes, values, here, state["blocksize"])
        shape = self._shapes[weight]
        return result[: math.prod(shape)].reshape(shape)


def _look_up(codes: Tensor, values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """``values[codes]`` (n,), each block of codes times its scale."""
    found = values[codes.long()]
    return found * scales[: -(-len(codes) // blocksize)].repeat_interleave(blocksize)[: len(codes)]
