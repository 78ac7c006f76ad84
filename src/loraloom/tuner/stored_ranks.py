"""Whether the ranks of a configuration can be those of the file beside it, before layers are made of them."""

import math
from typing import Any

from safetensors import SafetensorError, safe_open

from loraloom.errors import InputError

_SMALL = 1024  # no harm in a rank up to this, which may be of no module


def check_ranks(config: Any, file: str) -> None:
    """Raises InputError where a rank is larger than any side of a tensor of the file.

    Layers are made before a tensor is loaded: a rank that the file does not hold would be allocated first.

    Args:
        config: a ``LoomConfig`` that was read.
        file: the adapter's safetensors; a broken one is left to the loader.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError):
        return
    largest = max((max(shape, default=0) for shape in shapes if math.prod(shape)), default=0)
    members = {} if config.composition is None else {n: sum(r) for n, r in config.composition.ranks.items()}
    for name, rank in {"r": config.r, **config.rank_pattern, **members}.items():
        if rank > max(largest, _SMALL):
            raise InputError(
                f"{file}: the configuration says the rank {rank} ({name:.80}), and no side of a tensor is longer than "
                f"{largest}: save the adapter again",
                code="rank",
            )
