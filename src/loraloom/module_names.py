"""Modules as people name them: the layer that one sits in, and what to call it at the head of a column."""

import re
from collections.abc import Iterable


def place(module: str) -> tuple[str, str]:
    """The number of a module's layer, or "-" where it is in none, and its name within the layer.

    "model.layers.3.mlp.experts.7.up_proj" gives ("3", "mlp.experts.7.up_proj"): the first number counts layers.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", module)
    return (match[1], match[2]) if match else ("-", module)


def short_names(modules: Iterable[str]) -> dict[str, str]:
    """Every module's shortest ending, in whole parts of its path, that no other of them shares."""
    modules = list(dict.fromkeys(modules))
    return {module: _shortest_ending(module, modules) for module in modules}


def _shortest_ending(module: str, modules: list[str]) -> str:
    parts = module.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((e for e in endings if sum(f".{m}".endswith(f".{e}") for m in modules) == 1), module)
