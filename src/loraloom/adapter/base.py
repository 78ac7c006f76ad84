"""The weights of a base model that an adapter refers to, and what the adapter adds to them."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapter.stored import CONV1D_MODELS, StoredAdapter, as_matrix, base_keys, stored_transposed
from loraloom.errors import InputError
from loraloom.io.checkpoint import locate, open_checkpoint, read_json
from loraloom.update.update import Update

_EMBEDDING = re.compile(r".*embed\w*|wte|wpe")


class BaseWeights:
    """The base weights of an adapter's modules, read when they are asked for.

    Attributes:
        keys: for each of the adapter's modules the name of its weight in the base, None where there is none.
        checkpoint: the base's tensors.
    """

    def __init__(self, path_or_id: str | Path, adapter: StoredAdapter) -> None:
        folder = locate(path_or_id)
        self.checkpoint = open_checkpoint(folder)
        config = folder / "config.json"
        self._config: dict[str, Any] = read_json(config) if config.is_file() else {}
        self._adapter = adapter
        self.keys = base_keys(adapter.modules, self.checkpoint)

    def transposed(self, module: str) -> bool:
        """Whether the module's weight is stored as W^T.

        Raises:
            InputError: its shape is not that of the update, or it is quantised.
        """
        key = self.keys[module]
        assert key is not None
        shape, dtype = self.checkpoint.shape(key), self.checkpoint.dtype(key)
        if not dtype.is_floating_point or dtype.itemsize == 1:  # float8 has scales of its own
            raise InputError(f"{module} is stored as {dtype} in the base, quantised: give the original base model")
        return stored_transposed(module, self._adapter.shape(module), shape, self._config, self._adapter.config)

    def matrix(self, module: str) -> Tensor:
        """The module's weight as W (out, in), in its stored dtype."""
        key = self.keys[module]
        assert key is not None
        return as_matrix(self.checkpoint.tensor(key), self.transposed(module))

    def is_embedding(self, module: str) -> bool:
        """Whether the module is a table of vectors: stored as W^T, and no Conv1D."""
        if self._config.get("model_type") in CONV1D_MODELS or self._adapter.config.get("fan_in_fan_out"):
            return looks_like_embedding(module)
        return self.keys[module] is not None and self.transposed(module)


def looks_like_embedding(module: str) -> bool:
    """Whether the module is a table of vectors, by its name, where nothing else tells."""
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def weight_update(adapter: StoredAdapter, module: str, W: Tensor) -> Tensor:
    """What merging adds to W (out, in): ``D``, or with DoRA ``m (W + D) / rownorm(W + D) - W``, in at least float32."""
    return Update(adapter.terms(module), adapter.magnitude(module)).change(W)
