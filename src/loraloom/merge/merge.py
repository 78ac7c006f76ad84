"""Merging adapters into a base checkpoint on disk, a block of rows at a time: no model is built.

W' = m * (W + D) / rownorm(W + D) with D = sum g s B M A, see :mod:`loraloom.merge.edits`. The result has the
base's shards, index, tokenizer and configuration, and appears under its name only when it is complete.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from loraloom.adapter.open import open_stored
from loraloom.adapter.stored import StoredAdapter
from loraloom.card import write_card
from loraloom.errors import InputError
from loraloom.io.checkpoint import INDEX, Checkpoint, locate, read_json, read_model_config
from loraloom.io.files import check_apart, check_new_folder, folder_atomically, write_text_atomically
from loraloom.io.quantized.checkpoint import QuantizedCheckpoint, open_base
from loraloom.io.stream import write_safetensors
from loraloom.merge.card import merge_card
from loraloom.merge.edits import Change, merged_blocks
from loraloom.merge.extra_files import other_files, tokenizer_files
from loraloom.merge.plan import Plan, plan_merge
from loraloom.merge.result import RESULT, MergeResult
from loraloom.progress import Progress, silent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a repository of the hub may hold besides weights; its pickles and weights of other formats are not loaded.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "LICENSE*")


def merge_checkpoint(
    adapters: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    base_precision: Literal["original", "dequantised"] = "original",
    overwrite: bool = False,
    progress: Progress = silent,
    command: str = "",
) -> MergeResult:
    """Merges adapters into a base model, both on disk, and writes a model that needs neither.

    Memory: the block of rows in work, with its float32 copies, and the adapter's factors of one module; of a quantised
    base one dequantised weight besides.

    Args:
        adapters: folders (or repositories of the hub) of PEFT's LoRA or loraloom adapters, with any of their parts.
        base: folder (or repository) of the model that they were trained on, in safetensors.
        out: the folder to write; it appears when it is complete.
        weights: one per adapter: the result is W + sum w_i (W_i - W). Default 1 each, which is the model with all
            adapters active.
        dtype: "float32", "bfloat16" or "float16" for all floating-point weights. Default: each as in the base;
            "bfloat16" for a dequantised base. Merging is in float32 and rounds once.
        base_precision: "original": the base is the model in its original precision; a quantised one is refused.
            "dequantised": the base is quantised, and what its weights stand for is merged into.
        overwrite: replace a folder that is not empty.
        progress: is told of the tensors written.
        command: what was typed, for the model card.

    Raises:
        InputError: wrong or unreadable input, a tensor of an adapter that has no place in the base, a lack of disk
            space, or an output folder in use. Nothing is written then.
        RunFailedError: a merged weight is not finite. Nothing is left then.
    """
    started = time.monotonic()
    out = Path(out).expanduser().resolve()
    opened = [open_stored(adapter) for adapter in adapters]
    factors = _weights(weights, len(opened))
    folder = locate(base, _PATTERNS)
    check_apart(out, [folder, *(adapter.path for adapter in opened)])
    check_new_folder(out, overwrite)
    config = read_model_config(folder)
    weights_of_base = _open_base(folder, config, base_precision, opened)
    if base_precision == "dequantised":
        dtype = dtype or "bfloat16"
    plan = plan_merge(opened, factors, weights_of_base, config, _dtype(dtype))
    plan.notes += _notes(opened, folder, base_precision, str(dtype))
    copies = other_files(folder, out) | tokenizer_files(folder, [a.path for a in opened], plan.vocabulary_changed)
    _check_space(out, plan, copies)
    changes: dict[str, Change] = {}
    with folder_atomically(out, overwrite) as temporary:
        size = _write_weights(plan, weights_of_base, temporary, changes, progress)
        _write_index(plan, folder, temporary, size)
        for name, source in copies.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary / name)
        if plan.config != config:
            write_text_atomically(temporary / "config.json", json.dumps(plan.config, indent=2) + "\n")
        update = sum(change.update for change in changes.values())
        if not update and not plan.added:
            plan.notes.append("The merged model is the base: every update of the adapter is zero.")
        result = MergeResult(
            out=str(out),
            base=str(base),
            base_precision=base_precision,
            adapters=[str(adapter) for adapter in adapters],
            weights=factors,
            sha256=[adapter.sha256 for adapter in opened],
            dtype=dtype,
            bytes=size,
            shards=len(plan.files),
            modules={name: (c.update / c.base) ** 0.5 for name, c in changes.items()},
            added=plan.added,
            rounding=(sum(change.lost for change in changes.values()) / update) ** 0.5 if update else None,
            notes=plan.notes,
            seconds=round(time.monotonic() - started, 2),
            peak_memory_bytes=peak_memory(),
        )
        write_text_atomically(temporary / RESULT, json.dumps(result.to_dict(), indent=2) + "\n")
        write_card(merge_card(result, plan.config, command), temporary)
    return result


def verified(result: MergeResult, verification: dict[str, Any], command: str = "") -> MergeResult:
    """The result with a verification, written into the folder and its model card as well."""
    result = replace(result, verification=verification)
    folder = Path(result.out)
    write_text_atomically(folder / RESULT, json.dumps(result.to_dict(), indent=2) + "\n")
    write_card(merge_card(result, read_model_config(folder), command), folder)
    return result


def peak_memory() -> int:
    """Most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise InputError("no adapter given; expected at least one", code="adapters")
    factors = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(factors) != count:
        raise InputError(f"{len(factors)} weights for {count} adapters; expected one for each", code="weights")
    return factors


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise InputError(f"dtype {name!r}; expected one of {', '.join(DTYPES)}", code="dtype")
    return None if name is None else DTYPES[name]


def _open_base(folder: Path, config: dict[str, Any], base_precision: str, adapters: list[StoredAdapter]) -> Checkpoint:
    if base_precision not in ("original", "dequantised"):
        raise InputError(f"base_precision {base_precision!r}; expected original or dequantised", code="unknown-choice")
    base = open_base(folder, config)
    if not isinstance(base, QuantizedCheckpoint):
        if base_precision == "dequantised":
            raise InputError(f"{folder} is not quantised: leave out --base-precision dequantised", code="not-quantized")
        return base
    if base_precision == "original":
        names = dict.fromkeys(str(adapter.config.get("base_model_name_or_path")) for adapter in adapters)
        raise InputError(
            f"{folder} is quantised by {base.method}: give --base the model in its original precision (the adapter was "
            f"trained on {', '.join(names)}), or pass --base-precision dequantised to merge into what the quantised "
            "weights stand for",
            code="quantized",
        )
    return base


def _notes(adapters: list[StoredAdapter], folder: Path, base_precision: str, dtype: str) -> list[str]:
    notes = []
    if base_precision == "dequantised":
        notes.append(
            f"The base was quantised: its weights were dequantised, merged and written as {dtype}; the result is no "
            "longer quantised, and differs from a merge into the original weights by the quantisation error."
        )
    for adapter in adapters:
        trained_on = adapter.config.get("base_model_name_or_path")
        if trained_on and Path(trained_on).name != folder.resolve().name and "snapshots" not in folder.parts:
            notes.append(f"{adapter.path} was trained on {trained_on}, merged into {folder}: the same weights?")
    return notes


def _check_space(out: Path, plan: Plan, copies: dict[str, Path]) -> None:
    needed = sum(target.nbytes for target in plan.targets) + sum(path.stat().st_size for path in copies.values())
    existing = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"the merged model needs {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB left: free some, or "
            "choose a folder on another disk",
            code="disk-full",
        )


def _write_weights(
    plan: Plan,
    base: Checkpoint,
    folder: Path,
    changes: dict[str, Change],
    progress: Progress,
) -> int:
    """Writes every file of the plan; returns the bytes of all tensors."""
    size = done = 0
    total = len(plan.targets)
    for file, targets in plan.files.items():
        named = {target.name: target for target in targets}

        def blocks(name: str, named: dict = named) -> Iterator[torch.Tensor]:
            nonlocal done
            change = Change()
            yield from merged_blocks(named[name], base, change)
            if change.base and named[name].edits:
                changes[name.removesuffix(".weight")] = change
            done += 1
            progress("Merging", done, total)

        tensors = {target.name: (target.dtype, target.shape) for target in targets}
        size += write_safetensors(folder / file.name, tensors, blocks, base.metadata(file))
    return size


def _write_index(plan: Plan, base: Path, folder: Path, size: int) -> None:
    if not (base / INDEX).is_file():
        return
    index = read_json(base / INDEX)
    told = index.get("metadata")
    metadata = {**(told if isinstance(told, dict) else {}), "total_size": size}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(target.nbytes // target.dtype.itemsize for target in plan.targets)
    weight_map = {target.name: file.name for file, targets in plan.files.items() for target in targets}
    text = json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    write_text_atomically(folder / INDEX, text + "\n")
