"""Quantities as people read them."""


def readable_bytes(count: int | None) -> str:
    """`1.50 GiB`, `2.0 MiB`; `unknown` for None."""
    if count is None:
        return "unknown"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
