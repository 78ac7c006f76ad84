"""Checkpoints on disk, read lazily: a tensor is loaded when it is asked for, whatever shard it is in.

Only safetensors are read: a pickle (``.bin``, ``.pt``) can run code when it is loaded.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraloom.annotations import describe, matches
from loraloom.errors import InputError
from loraloom.text import did_you_mean

INDEX = "model.safetensors.index.json"
_WEIGHTS = (INDEX, "model.safetensors", "adapter_model.safetensors")
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


# What is read of a model's config.json.
_OF_MODELS: dict[str, Any] = {
    "model_type": str,
    "architectures": list[str],
    "vocab_size": int,
    "tie_word_embeddings": bool,
    "is_encoder_decoder": bool,
    "id2label": dict[str, str],
    "text_config": dict[str, Any],
    "quantization_config": dict[str, Any],
}


class Checkpoint:
    """The tensors of one or several safetensors files, by name. See :func:`open_checkpoint`.

    Nothing stays open or in memory between calls: a file is mapped while one of its tensors is copied out of it.

    Attributes:
        path: what was opened, a file or a folder.
        files: for each file, in order, the names of its tensors, in the file's order.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self._headers = {file: _header(file) for file in files}
        self.files = {file: list(header) for file, header in self._headers.items()}
        self._file_of: dict[str, Path] = {}
        for file, keys in self.files.items():
            for key in keys:
                if key in self._file_of:
                    raise InputError(
                        f"{key} is in {self._file_of[key].name} and in {file.name} of {path}: remove one",
                        code="duplicate",
                    )
                self._file_of[key] = file

    def keys(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._file_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return tuple(self._entry(key)["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """The tensor's dtype, from the header."""
        name = self._entry(key)["dtype"]
        if name not in DTYPES:
            raise InputError(f"{self.path}: {key!r} is stored as {name}, which is not read", code="dtype")
        return DTYPES[name]

    def nbytes(self, key: str) -> int:
        """The tensor's size on disk, in bytes."""
        start, end = self._entry(key)["data_offsets"]
        return end - start

    def file_of(self, key: str) -> Path:
        """The file that holds the tensor."""
        if key not in self._file_of:
            raise InputError(
                f"{self.path} has no tensor {key!r}{did_you_mean(key, self._file_of)}", code="missing-tensor"
            )
        return self._file_of[key]

    def tensor(self, key: str) -> Tensor:
        """The tensor, a copy of its own in memory."""
        return next(self.tensors([key]))[1]

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Several tensors, one after the other; each file is opened once for consecutive tensors."""
        file, handle = None, None
        for key in keys:
            if self.file_of(key) != file:
                file = self.file_of(key)
                handle = _open(file)
            yield key, handle.get_tensor(key).clone()  # type: ignore[union-attr]  # a view would keep the file mapped

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor of at least one dimension, along the first, a copy; only they are read."""
        return _open(self.file_of(key)).get_slice(key)[start:stop].clone()

    def metadata(self, file: Path) -> dict[str, str]:
        """The metadata in the header of one of the files."""
        return _open(file).metadata() or {}

    def _entry(self, key: str) -> dict[str, Any]:
        return self._headers[self.file_of(key)][key]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a safetensors file, or a folder with the weights of a model (in one file or in shards) or of an adapter.

    Raises:
        InputError: nothing there, weights in a format that is not safetensors, a broken or a missing file.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is not a .safetensors file; only safetensors are read", code="not-safetensors")
        return Checkpoint(path, [path])
    if not path.is_dir():
        raise InputError(f"{path} does not exist; expected a folder with {' or '.join(_WEIGHTS[1:])}", code="no-folder")
    found = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if found is None:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path} holds {pickles[0]}, a pickle, which can run code when it is loaded: "
                "save the weights as safetensors (save_pretrained does)",
                code="pickle",
            )
        raise InputError(f"{path} holds none of {', '.join(_WEIGHTS)}", code="no-weights")
    return Checkpoint(path, _shards(found) if found.name == INDEX else [found])


def locate(path_or_id: str | Path, patterns: tuple[str, ...] = ("*.json", "*.safetensors")) -> Path:
    """A folder on disk for a path, or for a repository of the Hugging Face hub, of which the matching files are loaded.

    Raises:
        InputError: there is no such folder and no such repository, or the hub cannot be reached.
    """
    path = Path(path_or_id).expanduser()
    name = str(path_or_id)
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name} does not exist", code="no-folder")
    from huggingface_hub import snapshot_download  # takes a second to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name} is no folder here, and loading it from the hub failed: {reason}", code="hub"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: it is missing, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text, and cannot be printed
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", code="unreadable") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", code="json") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected an object", code="json")
    return value


def read_model_config(folder: Path) -> dict[str, Any]:
    """A model's config.json, {} where there is none.

    Raises:
        InputError: it is not JSON, or a value that is read here has a wrong type.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    for part in (config, config.get("text_config") or {}):
        for key, hint in _OF_MODELS.items():
            if part.get(key) is not None and not matches(part[key], hint):
                raise InputError(f"{path}: {key} is {part[key]!r:.80}; expected {describe(hint)}", code="config-type")
    return config


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: write the index again with save_pretrained", code="index")
    for name in weight_map.values():
        if not isinstance(name, str) or "\0" in name:
            raise InputError(
                f"{index} names {name!r} as a file: write the index again with save_pretrained", code="json"
            )
    shards = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    for shard in shards:
        if shard.parent.resolve() != index.parent.resolve():
            raise InputError(f"{index} names a shard outside of its folder: {shard}", code="index")
        if not shard.is_file():
            raise InputError(f"{index} names {shard.name}, which is not there: load the checkpoint again", code="index")
    headers = {shard.name: set(_header(shard)) for shard in shards}
    for key, name in weight_map.items():
        if key not in headers[name]:
            raise InputError(
                f"{index} says that {key} is in {name}, which does not hold it: the files do not match", code="index"
            )
    return shards


def _open(file: Path) -> Any:
    with _broken_files_named(file):
        return safe_open(file, framework="pt")


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with _broken_files_named(file):
        safe_open(file, framework="pt")  # checks the whole header against the size of the file
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


@contextmanager
def _broken_files_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read as safetensors ({error}): save or load it again", code="not-safetensors"
        ) from None
