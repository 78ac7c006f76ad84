"""A batch whose samples use different adapters."""

from functools import lru_cache

import torch
from torch import Tensor

from loraloom.update.traced import is_traced


def samples_of(adapter_names: list[str], device: torch.device) -> dict[str, Tensor]:
    """Adapter name -> indices of its samples, made once for all layers of a model."""
    make = _samples_of.__wrapped__ if is_traced() else _samples_of
    return make(tuple(adapter_names), device)


@lru_cache(maxsize=16)
def _samples_of(adapter_names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(adapter_names):
        places.setdefault(name, []).append(place)
    with torch.inference_mode(False):  # indices made while generating are saved in training
        return {name: torch.tensor(indices, device=device) for name, indices in places.items()}
