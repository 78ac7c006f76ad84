"""Writing a safetensors file tensor by tensor: the header needs shapes and dtypes alone, so no tensor has to wait.

The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes one after the other.
https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.io.checkpoint import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as PyTorch's, readable by whom the umask lets (safetensors' own files are the owner's alone)."""
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, sizes, lambda name: [tensors[name].detach().cpu()], {"format": "pt"})


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a file as ``safetensors.torch.save_file`` does, holding no more than one block at a time.

    Args:
        path: the file.
        tensors: for each name its dtype and shape. They are written by falling size of the dtype, which keeps every
            tensor aligned, and otherwise in the order given.
        blocks: for a name, the tensor in consecutive pieces of any shape, each in the tensor's dtype.
        metadata: text that goes into the header; transformers wants ``{"format": "pt"}``.

    Returns:
        The number of bytes of the tensors.

    Raises:
        ValueError: the blocks of a tensor do not add up to its size, or are of another dtype.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            start, end = header[name]["data_offsets"]
            for block in blocks(name):
                if block.dtype is not tensors[name][0]:
                    raise ValueError(f"{name}: a block is {block.dtype}, expected {tensors[name][0]}")
                file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written = file.tell() - 8 - len(text)
            if written != end:
                raise ValueError(f"{name}: its blocks have {written - start} bytes, expected {end - start}")
        file.flush()
        os.fsync(file.fileno())
    return end
