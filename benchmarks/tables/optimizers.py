"""Tables of GaLore and its kin: rounding, refresh, step, bases, pre-training."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.study.harness import effect, shown_difference
from benchmarks.tables.format import lines, mib, rows_of, significant, spread

NAMES = {
    "AdamW": "AdamW, full rank",
    "GaLore svd": "GaLore, SVD",
    "GaLore subspace": "GaLore, subspace",
    "Fira": "Fira",
    "APOLLO": "APOLLO, scale 1",
    "LoRA": "LoRA (frozen random base)",
}
SEARCH_SEED = 100


def rounding() -> list[str]:
    """bfloat16 weights under each rounding."""
    what = {"AdamW": "AdamW (`weight_adam`, 2e-5)", "GaLore": "GaLore (2e-4, rank 96)"}
    body = [
        [
            *(what[row["optimizer"]], row["rounding"], f"{row['moved']:.3f}", f"{row['progress']:.2f}"),
            mib(row["state_bytes"]),
        ]
        for row in rows_of("rounding.json")
        if row["rounding"] != "float32"
    ]
    return lines(["optimizer", "rounding", "moved", "progress", "state"], body)


def refresh() -> list[str]:
    """CPU seconds of one new basis."""
    body = [
        [
            *(f"{row['width']} x {row['width']}", significant(row["svd"]), significant(row["subspace"])),
            *(f"{row['subspace / svd']:.3f}", significant(row["floor"])),
        ]
        for row in rows_of("galore_cpu.json")["refresh"]
    ]
    return lines(["one refresh", "SVD (galore-torch)", "subspace", "ratio", "two products and a QR"], body)


def step() -> list[str]:
    """CPU seconds of one optimizer step on the weights of a block."""
    at_once = {"galore-torch": ", in one step", "GaLore": ", one weight a step", "Fira": ", one weight a step"}
    body = [
        [
            row["optimizer"],
            f"{row['step']:.3f}",
            significant(row["all refreshes"]) + at_once[row["optimizer"]] if row["all refreshes"] else "",
            f"{row['mean step']:.3f}",
            f"{row['state MiB']:.1f} MiB",
        ]
        for row in rows_of("galore_cpu.json")["step"]
    ]
    heads = ["step", "refresh of all weights", "mean step, gap 200", "state"]
    return lines(["weights of one block, width 768", *heads], body)


def bases() -> list[str]:
    """How good a basis from a warm start is: the least and the most over the refreshes after the first."""
    found = [row for row in rows_of("galore_cpu.json")["overlap"] if row["step"]]
    body = []
    for rank in dict.fromkeys(row["rank"] for row in found):
        own = [row for row in found if row["rank"] == rank]
        cells = [
            f"{min(row[key] for row in own):.{digits}f} to {max(row[key] for row in own):.{digits}f}"
            for key, digits in (("energy", 3), ("energy, old basis", 2), ("overlap", 3))
        ]
        body.append([str(rank), *cells])
    return lines(["rank", "energy, subspace", "energy, basis of 10 steps ago", "overlap"], body)


def search() -> list[str]:
    """Every rate that was tried in pre-training."""
    content = rows_of("galore_pretrain.json")
    body = []
    for method, name in NAMES.items():
        tried = sorted(
            (row["lr"], row["loss"]) for row in content["runs"] if (row["method"], row["seed"]) == (method, SEARCH_SEED)
        )
        best = min(tried, key=lambda pair: pair[1])
        shown = [
            f"**{rate:g}: {loss:.3f}**" if (rate, loss) == best else f"{rate:g}: {loss:.3f}" for rate, loss in tried
        ]
        body.append([name, ", ".join(shown)])
    return lines(["", "rates tried: loss"], body)


def pretraining() -> list[str]:
    """The losses at the chosen rates, and every method less AdamW, pair by pair."""
    content = rows_of("galore_pretrain.json")
    finals: list[dict[str, Any]] = [{"arm": r["method"], **r} for r in content["runs"] if r["seed"] != SEARCH_SEED]
    times = {row["method"]: row for row in content["times"]}
    body = []
    for method, name in NAMES.items():
        losses = {row["seed"]: row["loss"] for row in finals if row["arm"] == method}
        base = {row["seed"]: row["loss"] for row in finals if row["arm"] == "AdamW"}
        pairs = [f"{losses[seed] - base[seed]:+.3f}" for seed in sorted(losses)]
        found = effect(finals, method, "AdamW", key="loss")
        p = shown_difference(found).rsplit(", ", 1)[-1]
        cells = [spread([*losses.values()]), "" if method == "AdamW" else f"{' '.join(pairs)}, {p}"]
        costs = [f"{times[method]['state bytes'] / 2**20:.2f} MiB"]
        costs += [f"{1e3 * times[method]['step']:.0f} ms", f"{1e3 * times[method]['optimizer']:.1f} ms"]
        body.append([name, *cells, *costs])
    return lines(["", "loss", "less AdamW, seed by seed", "state", "step", "of it optimizer"], body)


TABLES: dict[str, Callable[[], Sequence[str]]] = {
    "galore-rounding": rounding,
    "galore-refresh": refresh,
    "galore-step": step,
    "galore-bases": bases,
    "galore-search": search,
    "galore-pretraining": pretraining,
}
