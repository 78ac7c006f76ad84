"""Hostile safetensors: cut, lying, misshapen, misnamed; and what lies in the place of files."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile import values
from tests.hostile.case import ADAPTERS, MODEL, Case, case, weights_of
from tests.hostile.files import (
    SIZES,
    change_header,
    laid_out,
    read_safetensors,
    renamed,
    set_text,
    write_safetensors,
    write_text,
)
from tests.hostile.originals import CONFIG, WEIGHTS

Entries = dict[str, tuple[str, tuple[int, ...]]]
STORED = (*ADAPTERS, "base")


def truncated(originals: Path) -> Iterator[Case]:
    for of in STORED:
        file = originals / of / weights_of(of)
        size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
        cuts = {0, 1, 7, 8, 9, 8 + header // 2, 7 + header, 8 + header, 9 + header, size // 2, size - 1}
        for end in [*sorted(cuts), *(size + more for more in (1, 8, 2**20, 2**36))]:
            yield case("truncated", f"{end}", of, os.truncate, file.name, end)


def _lies(header: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    first, second = [key for key in header if key != "__metadata__"][:2]
    for key in ("dtype", "shape", "data_offsets"):
        for i, value in enumerate((None, True, -1, 1.5, 2**63, 2**70, "x", "f32", [], [-1], [2**32] * 3, ["4"], {})):
            yield f"{key}={i}", {**header, first: header[first] | {key: value}}
        yield f"no {key}", {**header, first: {k: v for k, v in header[first].items() if k != key}}
    for i, offsets in enumerate(([0, 0], [4, 0], [0, 2**40], [2**63] * 2, [0.0, 4.0], header[second]["data_offsets"])):
        yield f"offsets {i}", {**header, first: header[first] | {"data_offsets": offsets}}
    yield "metadata=1", {**header, "__metadata__": 1}
    yield "metadata of numbers", {**header, "__metadata__": {"a": 1}}
    yield "metadata", {**header, "__metadata__": {"\x1b[2J": values.LONG}}
    yield "an entry is a list", {**header, first: [1, 2]}
    yield "nothing", {}
    yield "only metadata", {"__metadata__": {"format": "pt"}}
    raw = (b"", b"{", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b'{"a":' * 50_000, b"[" * 10**6)
    yield from ((f"raw {i}", text) for i, text in enumerate(raw))


def headers(originals: Path) -> Iterator[Case]:
    for of in STORED:
        file = weights_of(of)
        header, data = read_safetensors(originals / of / file)
        for name, lie in _lies(header):
            yield case("header", name, of, write_safetensors, file, lie, data)
        for length in (0, 1, 7, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64 - 1):
            yield case("header", f"length {length}", of, write_safetensors, file, header, data, length)


def _entries(file: Path) -> Entries:
    header, _ = read_safetensors(file)
    return {key: (e["dtype"], tuple(e["shape"])) for key, e in header.items() if key != "__metadata__"}


def _lay_out(file: Path, entries: Entries, fill: bytes = b"\0") -> None:
    write_safetensors(file, *laid_out(entries, fill))


SHAPES = [(), (0,), (4,), (0, 32), (4, 0), (32, 4), (4, 31), (3, 32), (4, 32, 1), (4, 32, 1, 1), (1,) * 9]
SHAPES += [(10**9, 0), (0, 10**9), (2**31, 0), (2**62, 0), (4096, 32)]


def shapes(originals: Path) -> Iterator[Case]:
    for of, a, b in (("lora", "lora_A.weight", "lora_B.weight"), ("loom", "loom_lora_A.weight", "loom_lora_B.weight")):
        entries = _entries(originals / of / WEIGHTS)
        for part in (a, b):
            keys = [key for key in entries if key.endswith(part)]
            for shape in SHAPES:
                for name, some in (("first", keys[:1]), ("all", keys)):
                    changed = entries | {key: ("F32", shape) for key in some}
                    yield case("shapes", f"{name} {part}={shape}", of, _lay_out, WEIGHTS, changed)
        for rank in (0, 10**9, 2**62):  # both factors without an entry: no byte of data
            empty = {k: ("F32", (rank, 0) if k.endswith(a) else (0, rank)) for k in entries if k.endswith((a, b))}
            yield case("shapes", f"empty, rank {rank}", of, _lay_out, WEIGHTS, entries | empty)
            yield case("shapes", f"empty and said, rank {rank}", of, _empty, WEIGHTS, entries | empty, rank)
    entries = _entries(originals / "base" / MODEL)
    for key in list(entries)[:6]:
        for shape in SHAPES:
            yield case("shapes", f"{key}={shape}", "base", _lay_out, MODEL, entries | {key: ("F32", shape)})


def _empty(file: Path, entries: Entries, rank: int) -> None:
    _lay_out(file, entries)
    for key, value in (("r", str(rank)), ("rank_pattern", "{}")):
        set_text(file.with_name(CONFIG), key, value)


def dtypes(originals: Path) -> Iterator[Case]:
    for of in STORED:
        file = weights_of(of)
        entries = _entries(originals / of / file)
        for dtype in SIZES:
            for name, keys in (("first", [*entries][:1]), ("all", [*entries])):
                changed = entries | {key: (dtype, entries[key][1]) for key in keys}
                yield case("dtypes", f"{dtype} {name}", of, _lay_out, file, changed, b"\x01")
        for dtype in ("F4", "F6_E2M3", "F32 ", "f32", "Q4_0", "\x1b[2J"):
            yield case("dtypes", f"{dtype!a} without size", of, _set_dtype, file, dtype)


def _set_dtype(file: Path, dtype: str) -> None:
    change_header(file, lambda h: {k: v if k == "__metadata__" else v | {"dtype": dtype} for k, v in h.items()})


def numbers(originals: Path) -> Iterator[Case]:
    fills = {"nan": b"\0\0\xc0\x7f", "inf": b"\0\0\x80\x7f", "-inf": b"\0\0\x80\xff", "max": b"\xff\xff\x7f\x7f"}
    fills |= {"1e30": b"\xca\xf2\x49\x71", "tiny": b"\1\0\0\0", "ff": b"\xff", "zero": b"\0"}
    for of in STORED:
        entries = _entries(originals / of / weights_of(of))
        for name, fill in fills.items():
            yield case("numbers", name, of, _lay_out, weights_of(of), entries, fill)


def names(originals: Path) -> Iterator[Case]:
    texts = (*values.ESCAPES, *values.MARKUP, *values.PATHS, values.LONG, values.DEEP, ".", "..", "a..b")
    for of in STORED:
        for i, text in enumerate(texts):
            for where, change in _renamings(text).items():
                yield case("names", f"{where} {i}", of, renamed, weights_of(of), change)
            yield case("names", f"extra {i}", of, _add_tensor, weights_of(of), text)
    for i, text in enumerate(texts):  # in the configuration as well, so that names and configuration agree
        yield case("names", f"agreeing {i}", "lora", _agreeing, WEIGHTS, text)


def _renamings(text: str) -> dict[str, Callable[[str], str]]:
    return {
        "module": lambda key: key.replace("q_proj", f"{text}q_proj"),
        "layer": lambda key: key.replace("layers.1.", f"layers.1.{text}."),
        "start": lambda key: f"{text}{key}",
        "end": lambda key: f"{key}{text}",
    }


def _add_tensor(file: Path, name: str) -> None:
    header, data = read_safetensors(file)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    write_safetensors(file, header | {name: entry}, data + b"\0" * 4)


def _agreeing(file: Path, text: str) -> None:
    renamed(file, lambda key: key.replace("q_proj", f"{text}q_proj"))
    config = file.with_name(CONFIG)
    write_text(config, config.read_text().replace('"q_proj"', json.dumps(f"{text}q_proj")))


def flips(originals: Path) -> Iterator[Case]:
    """Bytes at random places, in the header and behind it."""
    for of in STORED:
        for file in (weights_of(of), CONFIG if of in ADAPTERS else "config.json"):
            content = (originals / of / file).read_bytes()
            for i in range(40):
                generator = random.Random(f"{of} {file} {i}")
                flipped = bytearray(content)
                end = min(len(content), 4_000) if i % 2 else len(content)
                for _ in range(1 + i % 4):
                    flipped[generator.randrange(end)] = generator.randrange(256)
                yield case("flips", f"{file} {i}", of, Path.write_bytes, file, bytes(flipped))


def links(originals: Path) -> Iterator[Case]:
    files = [(of, file) for of in ADAPTERS for file in (CONFIG, WEIGHTS)]
    files += [("base", file) for file in (MODEL, "config.json", "tokenizer.json")]
    for of, file in files:
        for target in ("nowhere", file, "/dev/zero", "/dev/null", "../secret.txt", "/proc/self/mem", "..", "/"):
            yield case("links", f"{file} to {target}", of, _link, file, target)
        yield case("links", f"{file} is a pipe", of, _replaced, file, os.mkfifo)
        yield case("links", f"{file} is a folder", of, _replaced, file, os.mkdir)
    for name in ("extra.json", "tokenizer_config.json", "sub", "README.md"):
        for target in ("../secret.txt", "..", "/", name, "/dev/zero"):
            yield case("links", f"{name} beside, to {target}", "base", _link, name, target)


def _link(file: Path, target: str) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def _replaced(file: Path, make: Callable[[Path], Any]) -> None:
    file.unlink()
    make(file)
