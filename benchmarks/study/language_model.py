"""Variants of LoRA on a language model, at searched rates: does any of them beat LoRA?

SmolLM2-135M-Instruct (`builtin:smollm2`) learns TREC's question types as text: it is asked `Question: ... Type:` and
answers with a word; an answer is right where the word of the right type is the likeliest of the six. So there is no new
head. LoRA of rank 8 on all linear layers of the blocks, STEPS steps of BATCH questions; rates are searched per arm,
three each, on DEV rows of the training set that no run trains on. "MoSLoRA's start alone" is LoRA whose A is multiplied
by MoSLoRA's orthogonal M before training: what its first weights are worth without a trained M.

    python -m benchmarks.study.language_model --data ../shared/data/trec --out study_language_model.jsonl
    python -m benchmarks.study.language_model --table study_language_model.jsonl
    python -m benchmarks.study.language_model --data ../shared/data/trec --step   # CPU seconds of a step
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.study.harness import Row, Store, answers, arm_table, read_rows
from loraloom import LoomConfig, build_optimizer
from loraloom.training.builtin import SMOLLM2, builtin_path

WORDS = (" description", " entity", " abbreviation", " human", " location", " number")
STEPS, BATCH, DEV, TEST, MAX_LENGTH = 48, 16, 200, 300, 48
PLAIN: Row = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
RATES = (2e-4, 6e-4, 2e-3)
SEEDS, DEV_SEEDS = tuple(range(6)), (100,)
SETTINGS: Row = {
    name: globals()[name]
    for name in ("WORDS", "STEPS", "BATCH", "DEV", "TEST", "MAX_LENGTH", "PLAIN", "RATES", "SEEDS", "DEV_SEEDS")
}
Texts = list[tuple[str, int]]
# Arm -> (parts of the adapter, options of the optimizer).
ARMS: dict[str, tuple[Row, Row]] = {
    "LoRA": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {}),
    "LoRA+, ratio 16": ({}, {"lora_plus_ratio": 16}),
    "MoSLoRA": ({"use_mixer": "orthogonal"}, {}),
    "MoSLoRA's start alone": ({}, {}),
    "DoRA": ({"use_dora": True}, {}),
    "mixer and DoRA": ({"use_mixer": "orthogonal", "use_dora": True}, {}),
}


class Questions:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(builtin_path(SMOLLM2))
        self.tokenizer.padding_side = "left"  # so that the answer follows the last token of every row
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.words = torch.tensor([self.tokenizer(word)["input_ids"][0] for word in WORDS])
        rows = {}
        for part in ("train", "test"):
            lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            rows[part] = [(row["text"], row["label"]) for row in map(json.loads, lines)]
        order = random.Random(0).sample(rows["train"], len(rows["train"]))
        self.pool, self.dev, self.test = order[DEV:], order[:DEV], rows["test"][:TEST]

    def tokens(self, rows: Texts) -> dict[str, Tensor]:
        texts = [f"Question: {text}\nType:" for text, _ in rows]
        return self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)

    def logits(self, model: nn.Module, rows: Texts) -> Tensor:
        """Of the six words, (rows, 6)."""
        with torch.autocast("cpu", torch.bfloat16):
            return model(**self.tokens(rows), logits_to_keep=1).logits[:, -1, self.words].float()


def adapted(arm: str, rate: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    parts, options = ARMS[arm]
    base = AutoModelForCausalLM.from_pretrained(builtin_path(SMOLLM2), dtype=torch.bfloat16)
    model = peft.get_peft_model(base, LoomConfig(**{**PLAIN, **parts}))
    if arm == "MoSLoRA's start alone":
        with torch.no_grad():
            for name, A in model.named_parameters():
                if "lora_A" in name:
                    A.copy_(nn.init.orthogonal_(torch.empty(A.shape[0], A.shape[0])) @ A)
    return model, build_optimizer(model, "adamw", lr=rate, weight_decay=0.0, **options)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Questions, rows: Texts) -> None:
    loss = nn.functional.cross_entropy(data.logits(model, rows), torch.tensor([label for _, label in rows]))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def run(arm: str, rate: float, seed: int, data: Questions, test: Texts) -> Row:
    model, optimizer = adapted(arm, rate, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 4, 1) * (1 - s / STEPS))
    rows = random.Random(seed).sample(data.pool, STEPS * BATCH)
    model.train()
    for step in range(STEPS):
        train_step(model, optimizer, data, rows[step * BATCH : (step + 1) * BATCH])
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([data.logits(model, test[at : at + 32]) for at in range(0, len(test), 32)])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**answers(logits, torch.tensor([label for _, label in test])), "trained": trained}


def step_seconds(data: Questions, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """CPU seconds of a training step of each arm: the least of three."""
    found = {}
    for arm in ARMS:
        model, optimizer = adapted(arm, RATES[0], 0)
        times = []
        for at in range(4):
            start = clock()
            train_step(model, optimizer, data, data.pool[at * BATCH : (at + 1) * BATCH])
            times.append(clock() - start)
        found[arm] = min(times[1:])
    return found


def table(path: Path) -> list[str]:
    """The study's table, in Markdown, from its rows."""
    rows = [row for row in read_rows(path) if row["stage"] == "test"]
    return arm_table(rows, [*ARMS], ("LoRA",), further=(("trained", "trained"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl of TREC")
    parser.add_argument("--out", type=Path, default=Path("study_language_model.jsonl"))
    parser.add_argument("--step", action="store_true", help="measure a step of each arm and stop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, metavar="ROWS", help="print the table of a finished file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(*table(arguments.table), sep="\n")
        return
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = Questions(arguments.data)
    if arguments.step:
        print(step_seconds(data))
        return
    store = Store(arguments.out, SETTINGS, [arguments.data / f"{part}.jsonl" for part in ("train", "test")])

    def one(stage: str, arm: str, rate: float, seed: int) -> Row:
        return run(arm, rate, seed, data, data.dev if stage == "search" else data.test)

    store.search_then_test([*ARMS], RATES, DEV_SEEDS, SEEDS, one)


if __name__ == "__main__":
    main()
