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
from typing import Any

import torch
from torch import Tensor

from loraloom.io.quantized.format import WholeFormat

_STATE = ".quant_state.bitsandbytes__"
_CHUNK = 2**21  # codes; look-ups need eight bytes for each


class BitsAndBytes(WholeFormat):
    """4-bit and 8-bit weights."""

    name = "bitsandbytes"

    def find(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self.stored:
            if _STATE in key:
                weight = key.partition(_STATE)[0]
                found[weight] = [weight, *(other for other in self.stored if other.startswith(f"{weight}."))]
            elif key.endswith(".SCB"):
                module = key.removesuffix(".SCB")
                parts = [f"{module}.weight", key, f"{module}.weight_format"]
                found[parts[0]] = [part for part in parts if part in self.stored]
        return found

    def shape(self, weight: str) -> tuple[int, ...]:
        state = self._state(weight)
        return self.stored.shape(weight) if state is None else tuple(state["shape"])

    def _state(self, weight: str) -> dict[str, Any] | None:
        """The quant_state of a 4-bit weight."""
        key = next((part for part in self.parts[weight] if _STATE in part), None)
        return None if key is None else json.loads(bytes(self.stored.tensor(key).tolist()))

    def whole(self, weight: str) -> Tensor:
        state = self._state(weight)
        stored = self.stored.tensor(weight)
        if state is None:
            return stored * (self.stored.tensor(f"{weight.removesuffix('.weight')}.SCB")[:, None] / 127)
        scales = self.stored.tensor(f"{weight}.absmax")
        if "nested_blocksize" in state:
            values, scale = (self.stored.tensor(f"{weight}.nested_{part}") for part in ("quant_map", "absmax"))
            scales = _look_up(scales, values, scale, state["nested_blocksize"]) + state["nested_offset"]
        values = self.stored.tensor(f"{weight}.quant_map")
        stored = stored.flatten().view(torch.uint8)  # bnb_4bit_quant_storage may be of another dtype
        result = torch.empty(2 * stored.numel())
        codes_at_once = _CHUNK // state["blocksize"] * state["blocksize"]
        for start in range(0, result.numel(), codes_at_once):
            packed = stored[start // 2 : (start + codes_at_once) // 2]
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
            here = scales[start // state["blocksize"] :]
            result[start : start + len(codes)] = _look_up(codes, values, here, state["blocksize"])
        shape = self.shape(weight)
        return result[: math.prod(shape)].reshape(shape)


def _look_up(codes: Tensor, values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """``values[codes]`` (n,), each block of codes times its scale."""
    found = values[codes.long()]
    return found * scales[: -(-len(codes) // blocksize)].repeat_interleave(blocksize)[: len(codes)]
