"""Weights as 8-bit numbers times scales: float8, or int8 without a zero point.

    W = weight * scale,   scale one number, one per row, or one per block of the last two dimensions

finegrained fp8 (DeepSeek-V3, 2412.19437, section 3.3.2) calls it ``weight_scale_inv`` and has blocks of
``weight_block_size``, 128 x 128; compressed-tensors (`float-quantized`, `int-quantized`), FBGEMM and ModelOpt call it
``weight_scale``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.io.quantized.format import Format

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_ENDINGS = ("_scale_inv", "_scale")


class ScaledFormat(Format):
    """float8 and int8 weights with scales beside them."""

    name = "fp8"

    def find(self) -> dict[str, list[str]]:
        found = {}
        for key in self.stored:
            if self.stored.dtype(key) in FLOAT8 | {torch.int8}:
                scale = next((key + ending for ending in _ENDINGS if key + ending in self.stored), None)
                if scale is not None and f"{key}_zero_point" not in self.stored:
                    found[key] = [key, scale]
        return found

    def shape(self, weight: str) -> tuple[int, ...]:
        return self.stored.shape(weight)

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        scale = self.stored.tensor(self.parts[weight][1]).float()
        shape = self.shape(weight)
        if scale.numel() == 1:
            scale = scale.reshape([1] * len(shape))
        elif scale.dim() == 1:
            scale = scale.reshape(-1, *[1] * (len(shape) - 1))
        for dim, block in enumerate(self._blocks(weight, shape, tuple(scale.shape))):
            entries = torch.arange(start, stop) if dim == 0 else torch.arange(shape[dim])
            scale = scale.index_select(dim, entries // block)
        return self.stored.rows(weight, start, stop).float().mul_(scale)

    def _blocks(self, weight: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> list[int]:
        """How many entries in a row share a scale, for every dimension."""
        size = dict(zip(range(len(shape) - 2, len(shape)), _block_size(self.config), strict=False))
        blocks = [
            n if count == 1 else 1 if count == n else size.get(dim, 0)
            for dim, (n, count) in enumerate(zip(shape, scales, strict=False))
        ]
        fit = len(scales) == len(shape) and all(blocks)
        if not fit or any(-(-n // block) != count for n, block, count in zip(shape, blocks, scales, strict=True)):
            raise InputError(
                f"{weight} is {list(shape)} and its scales {list(scales)}, which does not go with the block size "
                f"{list(_block_size(self.config)) or 'missing'} in config.json: download the base model again",
                code="quantized",
            )
        return blocks


def _block_size(config: Any) -> tuple[int, ...]:
    """Rows and columns of a block, () where config.json does not say."""
    return next(
        (tuple(size) for size in _sizes(config) if isinstance(size, list) and all(isinstance(n, int) for n in size)), ()
    )


def _sizes(config: Any) -> Iterator[Any]:
    """``weight_block_size``, or ``block_structure`` of a group of compressed-tensors."""
    yield config.get("weight_block_size")
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        yield weights.get("block_structure") if isinstance(weights, dict) else None
