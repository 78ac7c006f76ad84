"""The weights of a base model that an adapter refers to: which tensor a module's weight is, and which way it lies."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraloom.adapter.experts import ExpertPlaces
from loraloom.errors import InputError
from loraloom.io.checkpoint import Checkpoint, locate, read_model_config
from loraloom.io.quantized.checkpoint import open_base

if TYPE_CHECKING:
    from loraloom.adapter.protocol import Adapter

_EMBEDDING = re.compile(r".*embed\w*|wte|wpe")
# transformers' Conv1D stores (in, out). A square one looks like a Linear on disk, so these are known by name.
CONV1D_MODELS = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
CONV1D_NAMES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


class BaseWeights:
    """The base weights of an adapter's modules, read when they are asked for.

    Attributes:
        keys: for each of the adapter's modules the name of its weight in the base, None where there is none; for an
            expert of the first tensor that holds it.
        experts: those of the modules that are experts.
        checkpoint: the base's tensors.
    """

    def __init__(self, path_or_id: str | Path, adapter: "Adapter") -> None:
        folder = locate(path_or_id)
        self._config = read_model_config(folder)
        self.checkpoint = open_base(folder, self._config)
        self._adapter = adapter
        self.experts = {name: module.expert for name, module in adapter.modules.items() if module.expert is not None}
        self._places = ExpertPlaces(self.checkpoint, self._config)
        self.keys = base_keys((name for name in adapter.modules if name not in self.experts), self.checkpoint)
        self.keys |= {name: next(iter(self._places.keys(expert)), None) for name, expert in self.experts.items()}

    def transposed(self, module: str) -> bool:
        """Whether the module's weight is stored as W^T.

        Raises:
            InputError: its shape is not that of the update, or it is stored as integers.
        """
        key = self._key(module)
        if module in self.experts:
            self._places.of(self.experts[module], self._adapter.modules[module].shape)
            return False
        shape = self.checkpoint.shape(key)
        check_floating(module, self.checkpoint.dtype(key))
        return stored_transposed(module, self._adapter.modules[module].shape, shape, self._config, self._adapter.config)

    def matrix(self, module: str) -> Tensor:
        """The module's weight as W (out, in), in its stored dtype.

        Raises:
            InputError: as :meth:`transposed`, or it holds NaN or infinity.
        """
        if module in self.experts:
            self._key(module)
            places = self._places.of(self.experts[module], self._adapter.modules[module].shape)
            return torch.cat([place.read(self.checkpoint) for place in places])
        weight = as_matrix(self.checkpoint.tensor(self._key(module)), self.transposed(module))
        if not weight.isfinite().all():
            raise InputError(f"{self.keys[module]} of {self.checkpoint.path} holds NaN or infinity", code="not-finite")
        return weight

    def is_embedding(self, module: str) -> bool:
        """Whether the module is a table of vectors: stored as W^T, and no Conv1D."""
        if self._config.get("model_type") in CONV1D_MODELS or self._adapter.config.get("fan_in_fan_out"):
            return looks_like_embedding(module)
        return self.keys[module] is not None and self.transposed(module)

    def _key(self, module: str) -> str:
        key = self.keys[module]
        if key is None:
            raise InputError(
                f"{self.checkpoint.path} has no weight of {module}: expected the base model of {self._adapter.where}",
                code="unresolved",
            )
        return key


def check_floating(module: str, dtype: torch.dtype) -> None:
    """Raises InputError for a weight that is stored as integers, or as float8, which has scales of its own."""
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise InputError(
            f"{module} is stored as {dtype} in the base, quantised: give the original base model", code="quantized"
        )


def looks_like_embedding(module: str) -> bool:
    """Whether the module is a table of vectors, by its name, where nothing else tells."""
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def base_key(module: str, base: Checkpoint, kind: str = "weight") -> str | None:
    """The name of an adapted module's weight in a base checkpoint, or None.

    The same network is saved with and without the name of its body in front (``model.``, ``bert.``, ``transformer.``),
    and a head may be new, so one name may be an ending of the other; it must be the only one.
    """
    return base_keys([module], base, kind)[module]


def base_keys(modules: Iterable[str], base: Checkpoint, kind: str = "weight") -> dict[str, str | None]:
    """:func:`base_key` for many modules, in one pass over the checkpoint."""
    keys = [key for key in base if key.endswith(f".{kind}")]
    exact = set(keys)
    # A checkpoint's name without its first component, for a base saved inside another model.
    shorter: dict[str, list[str]] = {}
    for key in keys:
        shorter.setdefault(key.partition(".")[2], []).append(key)
    found: dict[str, str | None] = {}
    for module in modules:
        name = f"{module}.{kind}"
        candidates = [name] if name in exact else shorter.get(name, [])
        tail = name.partition(".")[2]
        if not candidates and tail in exact:
            candidates = [tail]
        found[module] = candidates[0] if len(candidates) == 1 else None
    return found


def stored_transposed(module: str, update: tuple[int, int], weight: tuple[int, ...], base: dict, adapter: dict) -> bool:
    """Whether a base weight is stored as W^T: tables of embeddings, and transformers' Conv1D.

    Args:
        module: the adapted module's name.
        update: (out, in) of the adapter's update.
        weight: shape of the stored weight.
        base: the base model's config.json, {} when there is none.
        adapter: adapter_config.json.

    Raises:
        InputError: the shapes fit neither way.
    """
    flat = (weight[0], math.prod(weight[1:])) if weight else (0, 0)
    fits, fits_transposed = flat == update, len(weight) == 2 and flat[::-1] == update
    if fits and fits_transposed:
        if base.get("model_type") in CONV1D_MODELS:
            return module.rpartition(".")[2] in CONV1D_NAMES
        return bool(adapter.get("fan_in_fan_out"))
    if not (fits or fits_transposed):
        raise InputError(
            f"{module}: the update is {update[0]} x {update[1]}, the base weight {'x'.join(map(str, weight))}; "
            "the adapter belongs to another base model",
            code="other-base",
        )
    return fits_transposed


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight as W (out, in)."""
    return weight.T if transposed else weight.flatten(1)


def as_weight(matrix: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """The inverse of :func:`as_matrix`."""
    return matrix.T if transposed else matrix.reshape(shape)
