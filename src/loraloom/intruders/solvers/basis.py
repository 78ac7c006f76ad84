"""Left singular vectors and singular values of a base weight, from the Gram matrix of its shorter side, with a cache.

    out <= in:   W W^T = U diag(s^2) U^T                  out > in:   W^T W = V diag(s^2) V^T,   U = W V / s

The Gram matrix squares the condition number, so it is formed and decomposed in float64. Vectors whose singular value
counts as zero (``RELATIVE_ZERO``) are left out: W does not determine them.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, Weight, tiles


class LeftBasis(NamedTuple):
    """W without its right singular vectors; p is its rank."""

    U: Tensor
    """(out, p) in float32, orthonormal columns."""
    S: Tensor
    """(p,) in float64, descending."""


def left_basis(W: Weight) -> LeftBasis:
    """The left singular vectors and the singular values of W (out, in)."""
    out, width = W.shape
    wide = out <= width
    gram = torch.zeros(min(out, width), min(out, width), dtype=torch.float64, device=W.device)
    if wide:
        dense = torch.cat([tile for _, tile in tiles(W, torch.float64)])
        torch.mm(dense, dense.T, out=gram)
    else:
        for _, tile in tiles(W, torch.float64):
            gram.addmm_(tile.T, tile)
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > squares[-1] * RELATIVE_ZERO**2
    vectors, values = vectors[:, kept].flip(1), squares[kept].flip(0).sqrt()
    if not wide:
        vectors = torch.cat([tile @ (vectors / values) for _, tile in tiles(W, torch.float64)])
    return LeftBasis(vectors.float().contiguous(), values)


class BasisCache:
    """Bases kept in memory and, with a folder, on disk: one ``<hash of the weight>.safetensors`` each.

    A weight is recognised by its content, so a cache can be shared by every adapter of a base model, and a changed
    weight cannot meet an old basis. A basis is as large as its weight in float32 (with the longer side cut to the
    shorter one).

    Args:
        cache_dir: where to keep the bases; created when needed. None keeps them in memory only.
    """

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self.folder = None if cache_dir is None else Path(cache_dir)
        self._bases: dict[str, LeftBasis] = {}

    def __call__(self, W: Weight) -> LeftBasis:
        """The left basis of W, see :func:`left_basis`; computed the first time."""
        key = fingerprint(W)
        if key not in self._bases:
            file = None if self.folder is None else self.folder / f"{key}.safetensors"
            if file is not None and file.exists():
                stored = load_file(file)
                self._bases[key] = LeftBasis(stored["U"].to(W.device), stored["S"].to(W.device))
            else:
                self._bases[key] = left_basis(W)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    aside = file.with_suffix(".part")
                    save_file(self._bases[key]._asdict(), aside)
                    aside.replace(file)
        return self._bases[key]


def fingerprint(W: Weight) -> str:
    """A hash of a weight's shape and values, the same for every float dtype that holds them."""
    digest = hashlib.sha256(repr(tuple(W.shape)).encode())
    for _, tile in tiles(W, torch.float32):
        digest.update(tile.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
