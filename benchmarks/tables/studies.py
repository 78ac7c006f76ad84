"""Tables of the studies: composition, WeightLoRA, forgetting."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.study import composition, forgetting, weightlora
from benchmarks.study.harness import effect, read_rows, shown_difference, shown_mean
from benchmarks.tables.format import ROWS, lines, rows_of, spread

COMPOSITION = ROWS / "study_composition.jsonl"
WEIGHTLORA = ROWS / "study_weightlora.jsonl"
FORGETTING = ROWS / "study_forgetting.jsonl"
SEARCH_SEED = 100  # of galore_pretrain.json
TREC_SHOTS = (1, 5, 10, 50)
# Of forgetting.json: (heading, learning rate, seeds); two of three seeds collapsed at the last rate.
CASES = (
    ("0.001, seed 0", 1e-3, (0,)),
    ("0.002, seeds 0, 1, 2", 2e-3, (0, 1, 2)),
    ("0.003, seeds 0, 1, 2", 3e-3, (0, 1, 2)),
    ("0.005, seed 0", 5e-3, (0,)),
    ("0.005, seeds 1, 2", 5e-3, (1, 2)),
)
SCALES = (1.0, 0.9, 0.75, 0.7, 0.5, 0.25, 0.0)


def few_shot() -> list[str]:
    """The first few-shot study, whose members are hardly related to the new task."""
    tests = [row for row in rows_of("few_shot.json") if row["stage"] == "test"]
    body = []
    for method in dict.fromkeys(row["method"] for row in tests):
        own = [row for row in tests if row["method"] == method]
        cells = [spread([row["accuracy"] for row in own if row["shots"] == shots]) for shots in TREC_SHOTS]
        rates = " / ".join(f"{rate:g}" for rate in own[0]["lrs"] if rate)
        body.append([method, *cells, f"{own[0]['trained']:,}", rates])
    heads = [f"{shots} a class" for shots in TREC_SHOTS]
    return lines(["accuracy, mean (least to most)", *heads, "trained, without the head", "rates: encoder / head"], body)


def first_weightlora() -> list[str]:
    """The first study of WeightLoRA, whose random control has as many adapters and fewer parameters."""
    runs = [{**row, "arm": row["variant"]} for row in rows_of("weightlora.json")]
    body = []
    for arm in dict.fromkeys(row["arm"] for row in runs):
        own = [row for row in runs if row["arm"] == arm]
        after = [row["after"] for row in own]
        sizes = [statistics.fmean(a[key] for a in after) for key in ("trainable_parameters", "optimizer_bytes")]
        random = arm.replace("WeightLoRA,", "random,")
        versus = [
            shown_difference(effect(runs, arm, other, key="accuracy")) if other != arm else ""
            for other in ("LoRA, all layers", random)
        ]
        cells = [spread([row["accuracy"] for row in own]), *versus, f"{sizes[0]:,.0f}", f"{sizes[1] / 2**20:.2f} MiB"]
        body.append([arm, *cells])
    heads = ["test accuracy, mean (least to most)", "less LoRA, all layers", "less random, same K"]
    return lines(["variant", *heads, "trained", "optimizer state"], body)


def real_case() -> list[str]:
    """Task and retention over the scale of the first intruder of each module."""
    runs = rows_of("forgetting.json")

    def cells(key: Callable[[list[dict[str, Any]]], str]) -> list[str]:
        chosen = [[r for r in runs if r["learning_rate"] == rate and r["seed"] in seeds] for _, rate, seeds in CASES]
        return [key(some) for some in chosen]

    def point(scale: float, some: list[dict[str, Any]]) -> str:
        metrics = [p["metrics"] for row in some for p in row["sweeps"]["top"] if p["scale"] == scale]
        means = [statistics.fmean(m[name] for m in metrics) for name in ("accuracy", "retention_accuracy")]
        return f"{means[0]:.3f} / {means[1]:.3f}"

    body = [[f"{scale:g}", *cells(partial(point, scale))] for scale in SCALES]
    counted = ("intruders", "layers_with_intruders")
    body.append(
        [
            f"intruders, in how many of {runs[0]['layers']} modules",
            *cells(lambda some: ", in ".join(between([row[key] for row in some]) for key in counted)),
        ]
    )
    body.append(["mean dW / W", *cells(lambda some: f"{statistics.fmean(row['relative_norm'] for row in some):.2f}")])
    return lines(["scale", *(heading for heading, _, _ in CASES)], body)


def against_a_lower_rate() -> list[str]:
    """Scaled intruders at a high rate, and the next lower rate as it is: the same three seeds."""
    runs = rows_of("forgetting.json")
    points = []
    for run in runs:
        for point in run["sweeps"]["top"]:
            arm = f"rate {run['learning_rate']:g}, scale {point['scale']:g}"
            metrics = point["metrics"]
            points.append({"arm": arm, "seed": run["seed"], "task": metrics["accuracy"]})
            points[-1]["retention"] = metrics["retention_accuracy"]
    baseline = "rate 0.002, scale 1"
    body = []
    for arm in (baseline, *(f"rate 0.003, scale {scale:g}" for scale in (1.0, 0.9, 0.75, 0.5))):
        cells = []
        for key in ("task", "retention"):
            cells.append(shown_mean(effect(points, arm, key=key)))
            cells.append("" if arm == baseline else shown_difference(effect(points, arm, baseline, key=key)))
        body.append([arm, *cells])
    return lines(["", "task", "less the lower rate's", "retention", "less the lower rate's"], body)


def language_model_step() -> list[str]:
    """What a step on SmolLM2 costs here, and with it the whole study."""
    content = rows_of("language_model_step.json")
    setting = content["setting"]
    body = [
        [row["arm"], f"{row['step']:.1f}", f"{row['step'] * setting['steps'] * setting['runs'] / 3600:.1f}"]
        for row in content["rows"]
    ]
    heads = ["CPU seconds of a step", f"hours, were all {setting['runs']} runs of {setting['steps']} steps like it"]
    return lines(["arm", *heads], body)


def between(counts: Sequence[int]) -> str:
    """``4``, or ``8 to 9``."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def which_method() -> list[str]:
    """What to take when, with what was measured."""
    layer = {(r["tokens"], r["what"], r["peer"]): r["ratio"] for r in rows_of("adapter_layer_cpu.json")["time_ms"]}
    times = []
    for peer in ("PEFT DoRA", "PEFT LoRA"):
        ratios = [ratio for (_, what, other), ratio in layer.items() if (what, other) == ("DoRA", peer)]
        times.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
    final = rows_of("galore_pretrain.json")
    state = {row["method"]: row["state bytes"] for row in final["times"]}
    loss = [{"arm": row["method"], **row} for row in final["runs"] if row["seed"] != SEARCH_SEED]
    galore, fira = (shown_difference(effect(loss, name, "AdamW", key="loss")) for name in ("GaLore subspace", "Fira"))
    kept = [{**row, "arm": row["variant"]} for row in rows_of("weightlora.json")]
    half, choice = (
        shown_difference(effect(kept, "WeightLoRA, K = 50%", other, key="accuracy"))
        for other in ("LoRA, all layers", "random, K = 50%")
    )
    few = [row for row in read_rows(COMPOSITION) if (row["stage"], row.get("shots")) == ("test", 5)]
    learned = "scaled softmax per layer, from 3"
    composed = {
        name: shown_difference(effect(few, learned, name, group="target"))
        for name in ("new LoRA", "best member", "uniform, total 3")
    }
    body = [
        ["the best accuracy for a given size", "[LoRA](lora.md), a rate search first", "the baseline of every table"],
        [
            "fewer adapters: less optimizer state, a smaller file",
            "[WeightLoRA](weightlora.md)",
            f"half of the adapters: accuracy less LoRA's {half}, less a random half's {choice}; three seeds, and no "
            "control of equal size ([table](weightlora.md#does-it-choose-well))",
        ],
        [
            "a little more capacity at the same rank",
            "[MoSLoRA](moslora.md)",
            "no gain shown: independent re-runs have it level with LoRA",
        ],
        [
            "what DoRA is known for, at less cost",
            "[DoRA](dora.md)",
            f"{times[0]} of the time of PEFT's DoRA for one layer; {times[1]} of PEFT's LoRA",
        ],
        [
            "a new task from adapters of related tasks, and a handful of examples",
            "[compose](composition.md)",
            "5 examples a class, 11 related members, four targets: learned weights (the default) less a new LoRA "
            f"{composed['new LoRA']}; less the best member alone {composed['best member']}; less uniform weights with "
            f"the same total {composed['uniform, total 3']} ([tables](composition.md#few-examples-related-members))",
        ],
        [
            "to train all weights without AdamW's memory",
            "[GaLore](galore.md)",
            f"{state['GaLore subspace'] / state['AdamW']:.0%} of AdamW's state at rank 32 of 128; loss less AdamW's "
            f"{galore}; Fira {fira}; three seeds ([table](galore.md#pre-training))",
        ],
        [
            "less forgetting",
            "a lower rate first, then rewinding or [intruder dimensions](intruders.md)",
            "[a real case](intruders.md#a-real-case)",
        ],
        ["a 4-bit base", "`quantization: nf4`, any adapter", "the layer never looks inside the base"],
        [
            "to serve what you trained",
            "`loraloom export`, `loraloom merge`",
            "exact up to rounding but for DoRA ([what servers take](serving.md))",
        ],
    ]
    return lines(["you want", "take", "what we measured"], body)


TABLES: dict[str, Callable[[], Sequence[str]]] = {
    "few-shot": few_shot,
    "first-weightlora": first_weightlora,
    "real-case": real_case,
    "language-model-step": language_model_step,
    "against-a-lower-rate": against_a_lower_rate,
    **{f"composition-{shots}": partial(composition.table, COMPOSITION, shots) for shots in composition.SHOTS},
    "composition-search": partial(composition.search_table, COMPOSITION),
    "which-method": which_method,
    "weightlora": partial(weightlora.table, WEIGHTLORA),
    "forgetting-retention": partial(forgetting.table, FORGETTING, "retained"),
    "forgetting-task": partial(forgetting.table, FORGETTING, "right"),
}
