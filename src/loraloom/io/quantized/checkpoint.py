"""A quantised checkpoint that shows its weights as bfloat16 and reads them as float32, whatever their format."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.io.checkpoint import Checkpoint, open_checkpoint
from loraloom.io.quantized.bitsandbytes import BitsAndBytes
from loraloom.io.quantized.format import Format
from loraloom.io.quantized.fp4 import Fp4, Mxfp4Experts
from loraloom.io.quantized.packed import Awq, Gptq, PackedIntegers
from loraloom.io.quantized.scaled import FLOAT8, ScaledFormat

FORMATS: tuple[type[Format], ...] = (BitsAndBytes, Fp4, ScaledFormat, Mxfp4Experts, Gptq, Awq, PackedIntegers)
# Scales of activations and caches, which a model without quantisation has no place for.
_ACTIVATIONS = {"input_scale", "input_global_scale", "output_scale", "input_scale_ub", "activation_scale"}
_ACTIVATIONS |= {"q_scale", "k_scale", "v_scale", "kv_scale"}


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a base model with the quantised ones dequantised when they are read.

    What belongs to the quantisation is not shown. Rows are dequantised as they are asked for, or one weight at a time.

    Args:
        path: what was opened.
        files: its safetensors files.
        config: ``quantization_config`` of config.json, {} where there is none.

    Attributes:
        method: the name of the format.

    Raises:
        InputError: a weight is in no format that is read ("quantized").
    """

    def __init__(self, path: Path, files: list[Path], config: Mapping[str, Any]) -> None:
        super().__init__(path, files)
        stored = Checkpoint(path, files)
        self._formats: dict[str, Format] = {}
        for kind in FORMATS:
            for weight in (found := kind(stored, config)).parts:
                self._formats.setdefault(weight, found)
        self.method = str(config.get("quant_method") or next((f.name for f in self._formats.values()), "unknown"))
        shown = {found.parts[weight][0]: weight for weight, found in self._formats.items()}
        hidden = {part for weight, found in self._formats.items() for part in found.parts[weight]} - shown.keys()
        hidden |= {key for key in stored if self._formats and key.rpartition(".")[2] in _ACTIVATIONS}
        known = shown.keys() | hidden
        for key in stored:
            if key not in known and _is_coded(stored, key):
                method = f"{self.method} {config.get('format', '')}".strip()
                raise InputError(
                    f"{path} is quantised by {method}: {key} is stored as {stored.dtype(key)} in a format that is not "
                    "read; give the model in its original precision",
                    code="quantized",
                )
        self.files = {
            file: [shown.get(key, key) for key in keys if key not in hidden] for file, keys in self.files.items()
        }
        self._file_of = {key: file for file, keys in self.files.items() for key in keys}

    @property
    def quantized(self) -> bool:
        """Whether any weight is."""
        return bool(self._formats)

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._formats:
            return super().shape(key)
        with self._broken_weights_named(key):
            return self._formats[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.bfloat16 if key in self._formats else super().dtype(key)

    def nbytes(self, key: str) -> int:
        if key not in self._formats:
            return super().nbytes(key)
        found = self._formats[key]
        return sum(found.stored.nbytes(part) for part in found.parts[key])

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        if key not in self._formats:
            return super().rows(key, start, stop)
        with self._broken_weights_named(key):
            found = self._formats[key].rows(key, start, stop)
            if found.shape[1:] != self.shape(key)[1:]:
                raise ValueError(f"its parts make {list(found.shape)} of {list(self.shape(key))}")
            return found

    @contextmanager
    def _broken_weights_named(self, key: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path}: {key} cannot be dequantised, its codes and scales do not fit together ({error}): "
                "download the base model again",
                code="quantized",
            ) from None

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            if key in self._formats:
                yield key, self.rows(key, 0, self.shape(key)[0])
            else:
                yield from super().tensors([key])


def open_base(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """The weights of a base model: a :class:`QuantizedCheckpoint` where they are quantised.

    Args:
        folder: of the model.
        config: its config.json, {} where there is none.

    Raises:
        InputError: the weights cannot be read, or are in a format of quantisation that is not read ("quantized").
    """
    plain = open_checkpoint(folder)
    quantization = config.get("quantization_config")
    found = QuantizedCheckpoint(folder, list(plain.files), quantization if isinstance(quantization, dict) else {})
    if quantization and not found.quantized:
        raise InputError(
            f"{folder} is quantised by {found.method}, in a format that is not read: give the model in its original "
            "precision",
            code="quantized",
        )
    return found if found.quantized else plain


def _is_coded(stored: Checkpoint, key: str) -> bool:
    """Whether the tensor looks like a weight that is not stored as itself."""
    dtype = stored.dtype(key)
    named = key.rpartition(".")[2] in ("weight", "qweight", "weight_packed")
    return dtype in FLOAT8 or (named and not dtype.is_floating_point)
