"""Weights as 4-bit floats with a scale for every 16 or 32 of them: MXFP4 and NVFP4.

A code is a sign bit and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 (E2M1); the first of two in a byte is the low half.

    MXFP4: W = code * 2^(scale - 127), 32 to a scale (OCP Microscaling 1.0, section 5.4)
    NVFP4: W = code * scale * tensor_scale, 16 to a float8 scale

GPT-OSS stores the experts (E, out, blocks, 16 bytes) as ``NAME_blocks`` and ``NAME_scales``, and its model has them as
NAME (E, in, out). compressed-tensors has ``weight_packed`` and, for NVFP4, ``weight_global_scale`` to divide by;
ModelOpt has bytes under ``weight`` and ``weight_scale_2`` to multiply by.
"""

import torch
from torch import Tensor

from loraloom.io.quantized.format import Format, with_parts

_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_VALUES = torch.cat([_VALUES, -_VALUES])


class Mxfp4Experts(Format):
    """GPT-OSS's experts."""

    name = "mxfp4"

    def find(self) -> dict[str, list[str]]:
        return dict(with_parts(self.stored, "_blocks", "_scales"))

    def shape(self, weight: str) -> tuple[int, ...]:
        *experts, out, blocks, half = self.stored.shape(self.parts[weight][0])
        return (*experts, blocks * half * 2, out)

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        codes, scales = (self.stored.rows(part, start, stop) for part in self.parts[weight])
        return (_decoded(codes) * _power(scales)[..., None]).flatten(-2).mT


class Fp4(Format):
    """Linear layers, by compressed-tensors or ModelOpt."""

    name = "nvfp4"

    def find(self) -> dict[str, list[str]]:
        found = {}
        for stem, parts in with_parts(self.stored, ".weight_packed", ".weight_scale"):
            if self.stored.dtype(parts[0]) is torch.uint8:
                found[f"{stem}.weight"] = [*parts, *self._present(f"{stem}.weight_global_scale")]
        for stem, parts in with_parts(self.stored, ".weight", ".weight_scale", ".weight_scale_2"):
            if self.stored.dtype(parts[0]) is torch.uint8:
                found[f"{stem}.weight"] = parts
        return found

    def _present(self, key: str) -> list[str]:
        return [key] if key in self.stored else []

    def shape(self, weight: str) -> tuple[int, ...]:
        *rows, half = self.stored.shape(self.parts[weight][0])
        return (*rows, half * 2)

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        codes, scales, *tensor_scale = self.parts[weight]
        scale = self.stored.rows(scales, start, stop)
        scale = _power(scale) if scale.dtype is torch.uint8 else scale.float()
        for key in tensor_scale:
            factor = self.stored.tensor(key).float()
            scale = scale / factor if key.endswith("global_scale") else scale * factor
        values = _decoded(self.stored.rows(codes, start, stop))
        return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def _decoded(codes: Tensor) -> Tensor:
    """Bytes (..., n) as numbers (..., 2 n)."""
    return _VALUES[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()]


def _power(exponents: Tensor) -> Tensor:
    """``2^(e - 127)`` of bytes."""
    return torch.exp2(exponents.float() - 127)
