"""Changing one file of a folder: a key of its JSON, the header or the data of its safetensors."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
SIZES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
Header = dict[str, Any]


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def set_text(file: Path, key: str, value: str, within: str | None = None) -> None:
    """Puts the text `value` in the place of a key's value, whether it is JSON or not."""
    content, mark = read_json(file), "\x01mark\x01"
    (content if within is None else content[within])[key] = mark
    write_text(file, json.dumps(content).replace(json.dumps(mark), value))


def write_text(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def read_safetensors(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(file: Path, header: Header | bytes, data: bytes = b"", length: int | None = None) -> None:
    """Writes what it is given; `length` is what the first eight bytes say, None: the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes((len(text) if length is None else length % 2**64).to_bytes(8, "little") + text + data)


def change_header(file: Path, change: Callable[[Header], Any]) -> None:
    """Changes the header and keeps the data as they are."""
    header, data = read_safetensors(file)
    write_safetensors(file, change(header) or header, data)


def laid_out(entries: Mapping[str, tuple[str, tuple[int, ...]]], fill: bytes = b"\0") -> tuple[Header, bytes]:
    """A sound header for these dtypes and shapes, and data in which `fill` is repeated."""
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header, (fill * (end // len(fill) + 1))[:end]


def renamed(file: Path, change: Callable[[str], str]) -> None:
    """Renames the tensors of a file."""
    change_header(file, lambda header: {k if k == "__metadata__" else change(k): value for k, value in header.items()})
