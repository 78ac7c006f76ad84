"""What an export reports."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleExport:
    """One module: its rank before and after, and ``||dW - dW'||_F / ||dW||_F`` of what was read back."""

    module: str
    rank: int
    exported_rank: int
    error: float


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how exact it is.

    Attributes:
        path: the new folder.
        target: for whom.
        rank: the largest rank, which is that of all modules unless the target is "peft".
        dtype: of the factors.
        modules: one entry per exported module.
        dropped: modules whose update is zero.
        completed: modules with factors of zeros, which SGLang needs beside those that are adapted.
        error: ``||dW - dW'|| / ||dW||`` over all modules together, Frobenius norms.
        lossy: whether something was truncated, so that the error is not rounding alone.
    """

    path: str
    target: str
    rank: int
    dtype: str
    modules: list[ModuleExport]
    dropped: list[str] = field(default_factory=list)
    error: float = 0.0
    lossy: bool = False
    completed: list[str] = field(default_factory=list)

    @property
    def worst(self) -> ModuleExport:
        """The module with the largest error."""
        return max(self.modules, key=lambda module: module.error)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)
