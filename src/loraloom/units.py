"""Quantities as people read them."""


def readable_bytes(count: float | None) -> str:
    """`1.50 GiB`, `2.0 MiB`, `512 B`; `unknown` for None."""
    if count is None:
        return "unknown"
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if count >= 0.95 * size:  # 0.98 GiB reads better than 1001.4 MiB
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"
