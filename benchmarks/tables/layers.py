"""Tables of times: compositions, intruder dimensions, experts."""

from collections.abc import Callable, Sequence

from benchmarks.tables.format import lines, rows_of, significant

TOKENS, MEMBERS = (64, 256, 1024), (1, 8, 32)


def composition_cost() -> list[str]:
    """Forward and backward of one layer: composition, PEFT's adapters active together, PEFT's with frozen members."""
    found = {(r["tokens"], r["what"], r["peer"]): r for r in rows_of("composition_cpu.json")["time_ms"]}
    body = []
    for tokens in TOKENS:
        for n in MEMBERS:
            ours = [found[tokens, f"composition of {n}", peer] for peer in peers(n)]
            summed = found[tokens, f"{n} summed", f"PEFT, {n} active"]
            bare, active, frozen = (row["peer_value"] for row in ours)
            times = [bare, ours[0]["value"], summed["value"], active, frozen]
            ratios = [ours[1]["ratio"], ours[2]["ratio"], ours[0]["ratio"], summed["ratio"]]
            cells = [f"{value:.1f} ms" for value in times] + [f"{ratio:.2f}" for ratio in ratios]
            body.append([str(tokens), str(n), *cells])
    heads = ["tokens", "N", "bare layer", "composition", "N summed", "PEFT, N active", "PEFT, N frozen"]
    ratios_of = ["composition / PEFT", "composition / PEFT frozen", "composition / bare", "summed / PEFT"]
    return lines([*heads, *ratios_of], body)


def peers(n: int) -> tuple[str, str, str]:
    return "bare layer", f"PEFT, {n} active", f"PEFT, {n} frozen"


def intruder_cost() -> list[str]:
    """Seconds of CPU of one layer, PEFT's function and ours."""
    keys = ("peft", "cold", "cached", "scale", "basis", "cold / peft", "cached / peft")
    body = [
        [str(row["width"]), *(significant(row[key]) for key in keys)] for row in rows_of("intruders_cpu.json")["rows"]
    ]
    heads = ["PEFT", "cold", "base cached", "one more scale", "decomposing the base", "cold / PEFT", "cached / PEFT"]
    return lines(["width", *heads], body)


def experts_cost() -> list[str]:
    """A training step of mixtures with adapters on their experts: PEFT's and ours."""
    rows = rows_of("experts_cpu.json")["rows"]
    theirs = {(row["shape"], row["way"]): row for row in rows if row["by"] == "PEFT"}
    columns = {"cpu_seconds": 1, "peak_bytes": 2**20, "saved_bytes": 2**20, "flops": 1e9}
    body = []
    for row in rows:
        if row["by"] != "PEFT":
            peer = theirs[row["shape"], row["way"]]
            pairs = [(peer[key] / unit, row[key] / unit) for key, unit in columns.items()]
            cells = [f"{significant(a)} / {significant(b)}" for a, b in pairs]
            body.append([row["shape"], f"`{row['way']}`", *cells, f"{row['difference']:.0e}"])
    heads = ["seconds of CPU", "peak MiB", "MiB saved for backward", "GFLOP", "largest difference"]
    return lines(["shape", "experts_implementation", *heads], body)


TABLES: dict[str, Callable[[], Sequence[str]]] = {
    "composition-cost": composition_cost,
    "intruder-cost": intruder_cost,
    "experts-cost": experts_cost,
}
