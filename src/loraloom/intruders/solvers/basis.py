"""Left singular vectors and singular values of a base weight, from the Gram matrix of its shorter side, with a cache.

    out <= in:   W W^T = U diag(s^2) U^T                  out > in:   W^T W = V diag(s^2) V^T,   U = W V / s

The Gram matrix squares the condition number, so it is formed and decomposed in float64. Vectors whose singular value
counts as zero (``RELATIVE_ZERO``) are left out: W does not determine them.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.errors import InputError
from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, Weight, tiles
from loraloom.io.checkpoint import open_checkpoint
from loraloom.io.files import file_atomically
from loraloom.io.stream import write_safetensors


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
    shorter one). A damaged file is computed and written again; several processes may share the folder.

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
            stored = None if file is None else _read(file, W)
            self._bases[key] = left_basis(W) if stored is None else stored
            if file is not None and stored is None:
                _write(file, self._bases[key])
        return self._bases[key]


def _write(file: Path, basis: LeftBasis) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in basis._asdict().items()}
    with file_atomically(file) as aside:
        sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_safetensors(aside, sizes, lambda name: [tensors[name]], {"sha256": _digest(tensors)})


def _read(file: Path, W: Weight) -> LeftBasis | None:
    """The basis in a file, or None where there is none of this weight that is whole."""
    if not file.exists():
        return None
    try:
        stored = open_checkpoint(file)
        tensors = dict(stored.tensors(["U", "S"]))
        whole = stored.metadata(file).get("sha256") == _digest(tensors)
    except InputError:
        return None
    U, S = tensors["U"], tensors["S"]
    if not whole or S.shape != U.shape[1:] or U.shape[0] != W.shape[0]:
        return None
    return LeftBasis(U.to(W.device), S.to(W.device))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("U", "S"):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(W: Weight) -> str:
    """A hash of a weight's shape and values, the same for every float dtype that holds them."""
    digest = hashlib.sha256(repr(tuple(W.shape)).encode())
    for _, tile in tiles(W, torch.float32):
        digest.update(tile.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
