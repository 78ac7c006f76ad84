"""Weights as small integers packed into int32 words: GPTQ, AWQ, and pack-quantized of compressed-tensors.

    W = (code - zero) * scale,   zero and scale for a group of inputs of every output

GPTQ (2210.17323) packs W^T along the inputs and AWQ (2306.00978) along the outputs, in an order of its own; GPTQ's
files but those of "gptq_v2" store zero - 1. compressed-tensors packs W along the inputs, zeros along the outputs.
"""

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.io.quantized.format import WholeFormat, with_parts

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies in each place of a word


class _Transposed(WholeFormat):
    """What GPTQ and AWQ share: ``qweight``, ``qzeros`` and ``scales`` (groups, out)."""

    def find(self) -> dict[str, list[str]]:
        found = {}
        if self.config.get("quant_method") == self.name:
            for stem, parts in with_parts(self.stored, ".qweight", ".qzeros", ".scales"):
                more = [f"{stem}.g_idx"]
                found[f"{stem}.weight"] = parts + [key for key in more if key in self.stored]
        return found

    @property
    def bits(self) -> int:
        return _bits(self.config.get("bits", self.config.get("w_bit", 4)), self.name)


class Gptq(_Transposed):
    """``qweight`` (in / codes, out)."""

    name = "gptq"

    def shape(self, weight: str) -> tuple[int, ...]:
        rows, out = self.stored.shape(self.parts[weight][0])
        return out, rows * 32 // self.bits

    def whole(self, weight: str) -> Tensor:
        codes, zeros, scales = (self.stored.tensor(key) for key in self.parts[weight][:3])
        codes = unpacked(codes.T, self.bits).T  # (in, out)
        zeros = unpacked(zeros, self.bits) + (self.config.get("checkpoint_format") != "gptq_v2")
        if len(self.parts[weight]) > 3:
            group = self.stored.tensor(self.parts[weight][3]).long()
        else:
            group = torch.arange(len(codes)) // -(-len(codes) // len(scales))
        return ((codes - zeros[group]) * scales.float()[group]).T.contiguous()


class Awq(_Transposed):
    """``qweight`` (in, out / codes)."""

    name = "awq"

    def find(self) -> dict[str, list[str]]:
        # The other versions of AutoAWQ pack otherwise under the same names.
        return super().find() if str(self.config.get("version", "gemm")).lower() == "gemm" else {}

    def shape(self, weight: str) -> tuple[int, ...]:
        inputs, words = self.stored.shape(self.parts[weight][0])
        return words * 32 // self.bits, inputs

    def whole(self, weight: str) -> Tensor:
        codes, zeros, scales = (self.stored.tensor(key) for key in self.parts[weight][:3])
        codes, zeros = (self._ordered(unpacked(part, self.bits)) for part in (codes, zeros))
        group = torch.arange(len(codes)) // -(-len(codes) // len(scales))
        return ((codes - zeros[group]) * scales.float()[group]).T.contiguous()

    def _ordered(self, codes: Tensor) -> Tensor:
        if self.bits != 4:
            raise InputError(f"the base is AWQ with {self.bits} bits; only 4 are read", code="quantized")
        places = torch.tensor(_AWQ_ORDER).argsort()
        return codes.unflatten(1, (-1, len(places)))[:, :, places].flatten(1)


class PackedIntegers(WholeFormat):
    """compressed-tensors' pack-quantized: ``weight_packed`` (out, in / codes), ``weight_scale`` (out, groups)."""

    name = "pack-quantized"

    def find(self) -> dict[str, list[str]]:
        found = {}
        for stem, parts in with_parts(self.stored, ".weight_packed", ".weight_scale", ".weight_shape"):
            if self.stored.dtype(parts[0]) is torch.int32:
                more = [f"{stem}.weight_zero_point", f"{stem}.weight_g_idx"]
                found[f"{stem}.weight"] = parts + [key for key in more if key in self.stored]
        return found

    def shape(self, weight: str) -> tuple[int, ...]:
        out, inputs = self.stored.tensor(self.parts[weight][2]).tolist()
        return out, inputs

    def whole(self, weight: str) -> Tensor:
        codes, scales = (self.stored.tensor(key) for key in self.parts[weight][:2])
        out, inputs = self.shape(weight)
        bits = _bits(32 * codes.shape[1] // inputs, self.name)
        more = {key.rpartition("_")[2]: self.stored.tensor(key) for key in self.parts[weight][3:]}
        middle = 2 ** (bits - 1)  # codes are stored as if they were unsigned
        values = unpacked(codes, bits)[:, :inputs] - middle
        if "point" not in more:
            zeros = torch.zeros(scales.shape, dtype=torch.int32)
        elif more["point"].dtype is torch.int32:
            zeros = unpacked(more["point"].T, bits).T[:out] - middle
        else:  # not packed: one for the whole weight, or an older file
            zeros = more["point"].int()
        zeros, scales = (part.reshape(-1, 1) if part.dim() < 2 else part for part in (zeros, scales))
        group = more["idx"].long() if "idx" in more else torch.arange(inputs) // -(-inputs // scales.shape[1])
        return (values - zeros[:, group]) * scales.float()[:, group]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Words (n, w) of int32 as codes (n, w * 32 / bits), the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


def _bits(bits: int, name: str) -> int:
    if bits not in (2, 4, 8):
        raise InputError(f"the base is {name} with {bits} bits; 2, 4 and 8 are read", code="quantized")
    return bits
