"""What adapters do to one stored tensor, applied a block of rows at a time.

    W' = W + sum_i w_i (W_i - W),    W_i = m_i * (V_i + D_i) / rownorm(V_i + D_i)

V_i is W, or what adapter i replaces it by (as a whole, or some rows: tokens), D_i its low-rank update, m_i DoRA's
magnitude (2402.09353) where it has one. Each adapter refers to the base weight alone, so their order is free.

A block is some rows of the tensor as it is stored: rows of W (out, in), or of W^T for embeddings and Conv1D.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraloom.adapter.stored import StoredAdapter
from loraloom.errors import RunFailedError
from loraloom.io.checkpoint import Checkpoint
from loraloom.update.terms import compute_dtype
from loraloom.update.update import row_scale

BLOCK = 2**22  # entries; in float32, with its copies, some 100 MB


@dataclass(frozen=True)
class Edit:
    """What one adapter does to one tensor; all parts are optional.

    Attributes:
        adapter: the adapter.
        weight: w of the adapter in the sum.
        replacement: name of the adapter's tensor that takes the place of the base's.
        tokens: rows that the adapter replaces, and the name of the tensor that holds them.
        module: the module whose low-rank update is added.
        transposed: the tensor is W^T.
        bias: the module whose ``lora_bias`` is added.
        span: the rows of the module's update that belong here, where the base stores its projections apart.
        experts: in a tensor that holds all experts, the modules whose updates are added, by their index; all of them
            are ``transposed`` or none.
    """

    adapter: StoredAdapter
    weight: float = 1.0
    replacement: str | None = None
    tokens: tuple[tuple[int, ...], str] | None = None
    module: str | None = None
    transposed: bool = False
    bias: str | None = None
    span: tuple[int, int] | None = None
    experts: dict[int, str] = field(default_factory=dict)


@dataclass
class Change:
    """Squared norms over all entries: of W, of W' - W, and of what rounding W' to the stored dtype takes away."""

    base: float = 0.0
    update: float = 0.0
    lost: float = 0.0

    def add(self, W: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Counts a block in."""
        self.base += torch.linalg.vector_norm(W, dtype=exact.dtype).item() ** 2
        self.update += torch.linalg.vector_norm(exact - W).item() ** 2
        self.lost += torch.linalg.vector_norm(rounded.to(exact.dtype) - exact).item() ** 2


@dataclass
class Target:
    """One tensor of the merged checkpoint.

    Attributes:
        name: its name there.
        dtype, shape: as it is stored there.
        source: its name in the base, None where it is new.
        edits: what the adapters do to it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str | None
    edits: list[Edit] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def merged_blocks(target: Target, base: Checkpoint, change: Change) -> Iterator[Tensor]:
    """The tensor with its edits, in blocks, merged in at least float32 and rounded once.

    Args:
        target: the tensor.
        base: the base checkpoint.
        change: norms are added to it, of a tensor that is in the base with the same shape.

    Raises:
        RunFailedError: the result has a NaN or an infinity that the base does not have.
    """
    if not target.shape or 0 in target.shape:
        whole = _whole(target, base)
        yield whole.to(target.dtype)
        return
    same_shape = target.source is not None and base.shape(target.source) == target.shape
    edits = [_Loaded(edit, target, base) for edit in target.edits]
    for start, stop in _spans(target.shape):
        # A tensor that an adapter gives another shape, or that the base lacks, has no base to be a difference to.
        W = base.rows(target.source, start, stop) if same_shape else None  # type: ignore[arg-type]
        if not edits:
            yield W.to(target.dtype)  # type: ignore[union-attr]
            continue
        exact = _sum([(edit.edit.weight, edit.rows(W, start, stop)) for edit in edits], W)
        rounded = exact.to(target.dtype)
        if not torch.isfinite(rounded).all() and (W is None or torch.isfinite(W).all()):
            raise RunFailedError(_not_finite(target, exact), code="not-finite")
        if W is not None:
            change.add(W, exact, rounded)
        yield rounded


def _sum(parts: list[tuple[float, Tensor]], W: Tensor | None) -> Tensor:
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    assert W is not None  # the plan weighs nothing that has no base
    base = W.to(compute_dtype(W))
    return base + sum(weight * (adapted - base) for weight, adapted in parts)


class _Loaded:
    """An edit with its small tensors in memory: folded factors, magnitude over norm, token rows."""

    def __init__(self, edit: Edit, target: Target, base: Checkpoint) -> None:
        self.edit = edit
        stored = edit.adapter.checkpoint
        self.tokens = None if edit.tokens is None else (torch.tensor(edit.tokens[0]), stored.tensor(edit.tokens[1]))
        self.bias = None if edit.bias is None else edit.adapter.modules[edit.bias].bias()
        self.A = self.B = self.magnitude = self.column_scale = None
        if edit.module is None:
            return
        module = edit.adapter.modules[edit.module]
        self.A, self.B = module.factors()
        self.B = self.B[slice(*(edit.span or (None,)))]
        self.magnitude = module.magnitude()
        if self.magnitude is not None and edit.transposed:
            # The norm of a row of W is that of a stored column, so it takes a pass of its own.
            squares = torch.zeros(target.shape[1], dtype=torch.float64)
            for start, stop in _spans(target.shape):
                W = None if edit.replacement else base.rows(target.source, start, stop)  # type: ignore[arg-type]
                squares += self._with_update(W, start, stop).double().square().sum(dim=0)
            self.column_scale = row_scale(self.magnitude, squares.sqrt()).to(compute_dtype(self.magnitude))

    def rows(self, W: Tensor | None, start: int, stop: int) -> Tensor:
        """The rows from start to stop of W_i, from those of W."""
        adapted = self._with_update(W, start, stop)
        if self.column_scale is not None:
            adapted *= self.column_scale
        elif self.magnitude is not None:
            flat = adapted.flatten(1)
            norm = torch.linalg.vector_norm(flat, dim=1)
            adapted = (flat * row_scale(self.magnitude[start:stop], norm)[:, None]).reshape(adapted.shape)
        return adapted

    def _with_update(self, W: Tensor | None, start: int, stop: int) -> Tensor:
        """V + D, in memory of its own."""
        if self.edit.replacement is not None:
            W = self.edit.adapter.checkpoint.rows(self.edit.replacement, start, stop)
        assert W is not None
        V = W.to(compute_dtype(W), copy=True)
        if self.tokens is not None:
            indices, values = self.tokens
            here = (indices >= start) & (indices < stop)
            V[indices[here] - start] = values[here].to(V.dtype)
        if self.bias is not None:
            V += self.bias[start:stop]
        for index in range(start, stop) if self.edit.experts else ():
            A, B = (factor.to(V.dtype) for factor in self.edit.adapter.modules[self.edit.experts[index]].factors())
            V[index - start].addmm_(*((A.T, B.T) if self.edit.transposed else (B, A)))
        if self.A is not None and self.B is not None:
            if self.edit.transposed:
                V.addmm_(self.A[:, start:stop].T.to(V.dtype), self.B.T.to(V.dtype))
            else:
                V.view(len(V), -1).addmm_(self.B[start:stop].to(V.dtype), self.A.to(V.dtype))
        return V


def _whole(target: Target, base: Checkpoint) -> Tensor:
    """A tensor without rows to split: a number, or empty."""
    replaced = [edit for edit in target.edits if edit.replacement is not None]
    if replaced:
        return replaced[-1].adapter.checkpoint.tensor(replaced[-1].replacement)  # type: ignore[arg-type]
    return base.tensor(target.source)  # type: ignore[arg-type]


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _not_finite(target: Target, exact: Tensor) -> str:
    adapters = ", ".join(str(edit.adapter.path) for edit in target.edits)
    if torch.isfinite(exact).all():
        return (
            f"{target.name}: the merged weight reaches {exact.abs().max():.3g}, which {target.dtype} cannot hold: "
            "merge with --dtype bfloat16 or float32"
        )
    return (
        f"{target.name}: merging {adapters} gives NaN or infinity; look at the adapter's tensors, nothing was written"
    )
