"""``extract``: the LoRA that is nearest to what full fine-tuning did, from the two checkpoints.

One weight at a time: ``W_tuned - W_base`` is formed, approximated (Eckart and Young, 1936) and let go.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter.base import CONV1D_MODELS, CONV1D_NAMES, looks_like_embedding
from loraloom.adapter.made import MadeAdapter, MadeModule, MadeReport
from loraloom.card import Card
from loraloom.errors import InputError, RunFailedError
from loraloom.export.export import ExportReport, export_adapter
from loraloom.io.checkpoint import Checkpoint, locate, open_checkpoint, read_model_config
from loraloom.io.files import check_apart
from loraloom.progress import Progress, silent, tracked
from loraloom.update.lowrank import best_approximation
from loraloom.update.terms import compute_dtype

_BLOCK = 2**22  # entries that are read at a time


@dataclass(frozen=True)
class ExtractReport(MadeReport):
    """What the LoRA holds of the difference, and what it cannot hold."""

    path: str
    """The new folder."""
    rank: int
    errors: dict[str, float]
    """Module -> ||D - B A|| / ||D||, Frobenius norms, D = W_tuned - W_base."""
    norms: dict[str, float]
    """Module -> ||D|| / ||W_base||."""
    unchanged: int
    """Weights that are equal in both checkpoints."""
    left_out: dict[str, float]
    """Tensor that differs and is in no LoRA of linear layers (embeddings, norms, biases) -> ||D|| / ||W_base||."""
    error: float
    """||D - B A|| / ||D|| over all modules together."""


@torch.no_grad()
def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    rank: int = 16,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
    command: str = "",
    progress: Progress = silent,
) -> ExtractReport:
    """Writes the plain LoRA nearest to the difference of two checkpoints of one architecture.

    Args:
        base: folder or hub repository of the model before.
        tuned: of the model after.
        out: the new folder; it appears when everything is written, read back and compared.
        rank: the largest of any module; where the difference has a smaller rank, that one is taken.
        overwrite: replace `out`.
        dtype: of the factors: float32, bfloat16 or float16.
        command: what was typed, for the model card.
        progress: is told of the weights subtracted, then of the modules written and compared.

    Raises:
        InputError: a file is missing or broken, a weight is quantised or has another shape, tensors that only one of
            the checkpoints has.
        RunFailedError: no linear layer differs.
    """
    if rank < 1:
        raise InputError(f"rank={rank} must be a positive integer", code="rank")
    folders = [locate(base), locate(tuned)]
    before, after = (open_checkpoint(folder) for folder in folders)
    config = read_model_config(folders[0])
    check_apart(Path(out), folders)
    _check_same(before, after)
    differences = _Differences(before, after, config)
    modules: dict[str, MadeModule] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    left_out: dict[str, float] = {}
    unchanged, squares = 0, [0.0, 0.0]

    keys = [key for file in before.files for key in before.files[file]]
    for key in tracked(keys, "Subtracting", progress):
        D, norm, length = differences(key)
        if not norm:
            unchanged += 1
        elif differences.is_linear(key):
            module = key.removesuffix(".weight")
            A, B = best_approximation(D.flatten(1), rank)
            lost = float(torch.linalg.vector_norm(D.flatten(1).addmm_(B, A, alpha=-1)))
            errors[module], norms[module] = lost / norm, norm / length if length else math.inf
            squares[0], squares[1] = squares[0] + lost**2, squares[1] + norm**2
            kernel = tuple(D.shape[1:]) if D.dim() > 2 else ()
            modules[module] = MadeModule(module, lambda factors=(A, B): factors, kernel)  # type: ignore[misc]
        else:
            left_out[key] = norm / length if length else math.inf
    if not modules:
        raise RunFailedError(
            f"no linear layer of {folders[1]} differs from {folders[0]}: there is nothing to extract", code="zero"
        )
    settings = {"base_model_name_or_path": str(base), "fan_in_fan_out": config.get("model_type") in CONV1D_MODELS}
    if (config.get("architectures") or [""])[0].endswith("ForCausalLM"):
        settings["task_type"] = "CAUSAL_LM"
    digest = hashlib.sha256(json.dumps([str(folder) for folder in folders]).encode()).hexdigest()
    made = MadeAdapter(folders[1].name, modules, settings, digest)
    error = math.sqrt(squares[0] / squares[1])

    def card(original: Card, report: ExportReport) -> Card:
        facts = {
            "share of the difference that the rank loses, all modules": f"{error:.1e}",
            "largest of a module": f"{max(errors.values()):.1e}",
        }
        if left_out:
            facts["tensors that differ and are not in it"] = f"{len(left_out)} ({', '.join([*left_out][:3])}, ...)"
        return replace(
            original,
            title=f"{folders[1].name} as a LoRA",
            summary=f"What separates `{folders[1].name}` from `{folders[0].name}`, as a plain LoRA of rank {rank}.",
            facts=facts,
        )

    export_adapter(made, "peft", out, overwrite=overwrite, dtype=dtype, command=command, card=card, progress=progress)
    return ExtractReport(str(out), rank, errors, norms, unchanged, left_out, error)


class _Differences:
    def __init__(self, before: Checkpoint, after: Checkpoint, config: dict[str, Any]) -> None:
        self.before, self.after = before, after
        self.conv1d = config.get("model_type") in CONV1D_MODELS

    def __call__(self, key: str) -> tuple[Tensor, float, float]:
        """``D = W_tuned - W_base`` in at least float32, ``||D||`` and ``||W_base||``, a few rows at a time.

        D is empty where no LoRA of linear layers can hold it; a linear one is (out, in, ...).
        """
        D = torch.empty(0)
        changed, length = 0.0, 0.0
        for rows, W, tuned in self._blocks(key):
            if not (W.isfinite().all() and tuned.isfinite().all()):
                raise InputError(f"{key} holds NaN or infinity in one of the checkpoints", code="not-finite")
            floating = W.is_floating_point() and tuned.is_floating_point()
            dtype = compute_dtype(W, tuned) if floating else torch.float64
            W = W.to(dtype)
            part = tuned.to(dtype).sub_(W)
            changed += float(torch.linalg.vector_norm(part)) ** 2
            length += float(torch.linalg.vector_norm(W)) ** 2
            if self.is_linear(key):
                D = D if D.numel() else torch.empty(self.before.shape(key), dtype=dtype)
                D[rows] = part
        transposed = self.conv1d and key.split(".")[-2:-1] and key.split(".")[-2] in CONV1D_NAMES and D.dim() == 2
        return (D.T if transposed else D), math.sqrt(changed), math.sqrt(length)

    def _blocks(self, key: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The tensor of both checkpoints, some rows at a time."""
        shape = self.before.shape(key)
        if not shape:
            yield slice(None), self.before.tensor(key), self.after.tensor(key)
            return
        step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            yield slice(start, stop), self.before.rows(key, start, stop), self.after.rows(key, start, stop)

    def is_linear(self, key: str) -> bool:
        """Whether a LoRA of linear layers and convolutions can hold the tensor's update."""
        shape = self.before.shape(key)
        return key.endswith(".weight") and len(shape) >= 2 and not looks_like_embedding(key.removesuffix(".weight"))


def _check_same(before: Checkpoint, after: Checkpoint) -> None:
    only = sorted({*before} ^ {*after})
    if only:
        where = before.path if only[0] in before else after.path
        raise InputError(
            f"{only[0]} and {len(only) - 1} more tensors are in {where} alone: expected two checkpoints of one model",
            code="different-models",
        )
    for key in before:
        if before.shape(key) != after.shape(key):
            raise InputError(
                f"{key} is {before.shape(key)} in {before.path} and {after.shape(key)} in {after.path}: extract the "
                "LoRA of a model whose vocabulary was not resized",
                code="shape",
            )
        for checkpoint in (before, after):
            dtype = checkpoint.dtype(key)
            if dtype.itemsize == 1 and len(checkpoint.shape(key)) > 1:
                raise InputError(
                    f"{key} is stored as {dtype} in {checkpoint.path}, quantised: give the original weights",
                    code="quantized",
                )
