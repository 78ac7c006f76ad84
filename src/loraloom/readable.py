"""Names and amounts as people read them: where a module sits, what it is called in a table, how many bytes."""

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


def readable_bytes(count: float | None) -> str:
    """`1.50 GiB`, `2.0 MiB`, `512 B`; `unknown` for None."""
    if count is None:
        return "unknown"
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"
