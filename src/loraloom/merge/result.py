"""What a merge reports: merge.json as a dataclass."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from loraloom import __version__

RESULT = "merge.json"


@dataclass
class MergeResult:
    """What :func:`merge_checkpoint` wrote.

    Attributes:
        out: the folder.
        base: the base model as it was given.
        base_precision: "original", or "dequantised" where the base was a quantised checkpoint.
        adapters: the adapters' folders.
        weights: of the adapters in the sum.
        sha256: of the adapters' weights.
        dtype: what all weights were cast to, None where each kept its own.
        bytes: size of the weights.
        shards: number of files.
        modules: for every changed tensor that the base has, by module, ||W' - W|| / ||W||.
        added: tensors that the base does not store.
        rounding: ||round(W') - W'|| / ||W' - W|| over all changed tensors: what the stored dtype takes away of the
            update; None where nothing but new tensors came.
        notes: what a user should know, one sentence each.
        seconds: taken by the merge.
        peak_memory_bytes: the process's peak so far, the interpreter and torch included.
        versions: of loraloom and torch.
        verification: of :func:`loraloom.merge.verify.verify_merge`, if it was called.
    """

    out: str
    base: str
    base_precision: str
    adapters: list[str]
    weights: list[float]
    sha256: list[str]
    dtype: str | None
    bytes: int
    shards: int
    modules: dict[str, float]
    added: list[str]
    rounding: float | None
    notes: list[str]
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str] = field(default_factory=lambda: {"loraloom": __version__, "torch": str(torch.__version__)})
    verification: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)
