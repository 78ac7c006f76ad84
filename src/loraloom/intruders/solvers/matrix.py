"""An adapted weight ``W' = c (W + B A)`` as a linear map: it is multiplied with, and never formed.

W may be a tensor of any floating dtype, or something that yields its rows a tile at a time, as dequantising does; what
is not yet in the dtype of the vectors is converted tile by tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from loraloom.update.terms import compute_dtype
from loraloom.update.update import row_norm

TILE_ROWS = 1024
# Singular values under this share of the largest count as zero: rounding of a float32 weight is about as large, and the
# vectors that belong to them are a matter of the algorithm.
RELATIVE_ZERO = 1e-5


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix given by a function of rows, for weights that are stored in another form.

    Args:
        shape: (out, in).
        rows: ``rows(start, stop)`` gives those rows, (stop - start, in), floating point.
        device: where they are.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    device: torch.device


Weight: TypeAlias = Tensor | TiledMatrix


def tiles(W: Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """W a few rows at a time, in ``dtype``: pairs of the rows' slice and their values."""
    if isinstance(W, Tensor) and W.dtype == dtype:
        yield slice(0, W.shape[0]), W
        return
    for start in range(0, W.shape[0], TILE_ROWS):
        stop = min(start + TILE_ROWS, W.shape[0])
        tile = W[start:stop] if isinstance(W, Tensor) else W.rows(start, stop)
        yield slice(start, stop), tile.to(dtype)


def times(W: Weight, X: Tensor) -> Tensor:
    """``X W^T`` for rows X (b, in): (b, out)."""
    # A few rows times a matrix: BLAS takes several times as long for the same product with the operands transposed.
    return torch.cat([X @ tile.T for _, tile in tiles(W, X.dtype)], dim=1)


def transposed_times(W: Weight, Y: Tensor) -> Tensor:
    """``Y W`` for rows Y (b, out): (b, in)."""
    total = Y.new_zeros(len(Y), W.shape[1])
    for rows, tile in tiles(W, Y.dtype):
        total.addmm_(Y[:, rows], tile)
    return total


def squared_norms(W: Weight) -> Tensor:
    """``||W_i||^2`` of each row (out,), in at least float32."""
    dtype = compute_dtype(W) if isinstance(W, Tensor) else torch.float32
    return torch.cat([tile.square().sum(dim=1) for _, tile in tiles(W, dtype)])


@dataclass(frozen=True)
class AdaptedMatrix:
    """``W' = c (W + B A)``, c (out,) one factor per row or None for 1.

    Args:
        W: (out, in).
        A, B: folded factors (r, in) and (out, r).
        c: DoRA's ``m / rownorm(W + B A)``.
    """

    W: Weight
    A: Tensor
    B: Tensor
    c: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W.device

    def times(self, X: Tensor) -> Tensor:
        """``X W'^T`` for rows X (b, in), in their dtype: (b, out)."""
        Y = times(self.W, X).addmm_(X @ self.A.to(X.dtype).T, self.B.to(X.dtype).T)
        return Y if self.c is None else Y * self.c.to(X.dtype)

    def transposed_times(self, Y: Tensor) -> Tensor:
        """``Y W'`` for rows Y (b, out), in their dtype: (b, in)."""
        if self.c is not None:
            Y = Y * self.c.to(Y.dtype)
        return transposed_times(self.W, Y).addmm_(Y @ self.B.to(Y.dtype), self.A.to(Y.dtype))


def row_norms(W: Weight, A: Tensor, B: Tensor) -> Tensor:
    """``||W_i + (B A)_i||`` of each row (out,), see :func:`loraloom.update.update.row_norm`."""
    return torch.cat([row_norm(tile, A, B[rows]) for rows, tile in tiles(W, compute_dtype(A, B))])
