"""What a model's folder holds besides its weights, and which of it a merged model takes along."""

from pathlib import Path

from loraloom.errors import InputError
from loraloom.merge.result import RESULT

# Weights in other formats, which would be those before the merge, and what training leaves behind.
# fmt: off
_OTHER_FORMATS = frozenset((
    ".bin", ".ckpt", ".gguf", ".h5", ".mlmodel", ".msgpack", ".npz", ".onnx", ".onnx_data", ".ot", ".pkl", ".pt",
    ".pth", ".tflite",
))
# fmt: on
_INDEX = ".index.json"
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def other_files(folder: Path, out: Path) -> dict[str, Path]:
    """Every file of a model's folder that is no part of its weights, and not hidden.

    Checkpoints of training, adapters and earlier results in folders of their own are left; so is `out`, should it be
    in there.

    Returns:
        The path within the folder -> the file.

    Raises:
        InputError: a file is a link that leads out of the folder (and of the hub's cache).
    """
    found = {}
    own = ("adapter_config.json", RESULT)
    left = [path.parent for name in own for path in folder.rglob(name) if path.parent != folder]
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":  # the hub's cache, whose files are links
        inside.append(folder.parent.parent.resolve() / "blobs")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith((".", "checkpoint-")) for part in name.parts):
            continue
        if out in path.resolve().parents or any(part in path.parents for part in left):
            continue
        if path.name == "adapter_config.json":
            continue
        # Safetensors below are of another part of a pipeline, such as sentence-transformers' dense layers.
        if not any(parent in path.resolve().parents for parent in inside):
            raise InputError(
                f"{path} is a link to {path.resolve()}, out of the model's folder: it would be copied; remove it, or "
                "put a copy in its place",
                code="link",
            )
        weights = path.suffix in _OTHER_FORMATS or (path.parent == folder and path.suffix == ".safetensors")
        if not weights and not path.name.endswith(_INDEX) and path.name != RESULT:
            found[str(name)] = path
    return found


def tokenizer_files(base: Path, adapters: list[Path], vocabulary_changed: bool) -> dict[str, Path]:
    """The tokenizer of an adapter's folder, where the base has none or the adapter's vocabulary is another one.

    Returns:
        Name -> file; nothing where the base's tokenizer is to be kept.
    """
    if not vocabulary_changed and has_tokenizer(base):
        return {}
    with_one = next((adapter for adapter in adapters if has_tokenizer(adapter)), None)
    return {} if with_one is None else {n: with_one / n for n in _TOKENIZER if (with_one / n).is_file()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be loaded from the folder."""
    return any((folder / name).is_file() for name in _TOKENIZER)
