"""`loraloom quickstart --llm`: what a small language model writes before and after, without a hub.

SmolLM2-135M-Instruct reads a docstring of Python's standard library and is to name its package. Before training it
talks; afterwards it answers.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraloom.cli.options import save_report
from loraloom.errors import RunFailedError
from loraloom.training.config import (
    TRAINING_DEFAULTS,
    DataSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
)

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER, QUESTIONS = "quickstart-llm-run", "questions.jsonl"
ASKED, SHOWN, TOKENS = 40, 5, 12  # test rows that are asked and shown; how long an answer may get


def quickstart_config(folder: str, dtype: str) -> RunConfig:
    """A LoRA on all linear layers, one pass over 480 docstrings.

    Args:
        folder: output.dir.
        dtype: of the frozen weights.
    """
    return RunConfig(
        model=ModelSection(name="builtin:smollm2", task="causal-lm", dtype=dtype),  # type: ignore[arg-type]
        data=DataSection(path="stdlib-questions", max_length=128, max_train=480, max_test=100, validation_fraction=0),
        method=MethodSection(name="lora", r=16, lora_alpha=32),
        training={
            **TRAINING_DEFAULTS,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        output=OutputSection(dir=folder, overwrite=folder == FOLDER),
    )


def run(folder: str, typed: str, console: Console) -> dict[str, float]:
    """Ask, train, reload and ask again; the numbers that were shown.

    Args:
        folder: output.dir.
        typed: the command, for the card and the report.
        console: where to show them.

    Raises:
        InputError: the model's package is not installed ("missing-package").
        RunFailedError: the adapter cannot be reloaded.
    """
    from loraloom.training.builtin import SMOLLM2, builtin_path

    started = time.monotonic()
    with console.status("Unpacking the model, the first time"):
        builtin_path(SMOLLM2)
    with console.status("Loading PyTorch and transformers"):
        from loraloom.cli.train import show
        from loraloom.report.builders import report_of_run
        from loraloom.training.data import load_data
        from loraloom.training.fit import train
    config = quickstart_config(folder, faster_dtype())
    rows = load_data(config.data, config.model.task).test
    rows = rows.select(range(min(ASKED, len(rows))))
    with console.status(f"Asking the model as it is, in {config.model.dtype}"):
        before = answers_of_base(config, rows["prompt"][:])
    console.print(
        f"{config.model.name} is to name the package of a docstring. For example:\n{rows[0]['prompt']}\n"
        f"It goes on:{before[0]}\nTraining a LoRA on {config.data.max_train} docstrings; loss on the test set.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    show(train(config, console=console, command=typed), console)
    with console.status("Reloading the adapter in a fresh process, and asking it"):
        after = answers_in_fresh_process(Path(folder), rows["prompt"][:])
    numbers = {
        "right_before": share_right(before, rows["completion"][:]),
        "right_after": share_right(after, rows["completion"][:]),
        "seconds": round(time.monotonic() - started, 1),
    }
    console.print(answers_table(rows, before, after))
    console.print(
        f"Right answers to {len(rows)} test docstrings: {numbers['right_before']:.0%} before, "
        f"{numbers['right_after']:.0%} after, reloaded in a fresh process. {numbers['seconds']:.0f} s in all.\n\n"
        f"Next:\n  loraloom predict {folder} {folder}/{QUESTIONS}\n"
        f"  loraloom export {folder} --to vllm --out served",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    save_report(report_of_run(Path(folder), typed), Path(folder) / "report", console)
    return numbers


def faster_dtype() -> str:
    """The precision that multiplies matrices of the model's size faster on this machine: the least of five, in turns.

    On a GPU bfloat16, where it knows it.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    seconds = {"bfloat16": float("inf"), "float32": float("inf")}
    x, W = torch.randn(512, 576), torch.randn(1536, 576)
    for _ in range(5):
        for name in seconds:
            a, b = (matrix.to(getattr(torch, name)) for matrix in (x, W))
            start = time.perf_counter()
            a @ b.T
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


def answers_of_base(config: RunConfig, prompts: list[str]) -> list[str]:
    """What the model writes before any training."""
    from loraloom.training.data import load_data
    from loraloom.training.model import load_base, load_processor, resolve_max_length
    from loraloom.training.tasks import get_task
    from loraloom.training.tasks.base import AnswerOptions

    processor = load_processor(config.model)
    model, _ = load_base(config.model, load_data(config.data, config.model.task), processor)
    options = AnswerOptions(resolve_max_length(config, processor), max_new_tokens=TOKENS)
    return [answer["text"] for answer in get_task(config.model.task).answer(model, processor, prompts, options)]


def answers_in_fresh_process(folder: Path, prompts: list[str]) -> list[str]:
    """What `loraloom predict` gives: nothing of this process is left in it."""
    file = folder / QUESTIONS
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    command = [sys.executable, "-m", "loraloom.cli.main", "predict", str(folder), str(file)]
    command += ["--json", "--quiet", "--max-new-tokens", str(TOKENS)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise RunFailedError(f"reloading {folder} failed: {outcome.stderr.strip()}", code="not-verified")
    return [json.loads(line)["text"] for line in outcome.stdout.splitlines()]


def share_right(answers: list[str], expected: list[str]) -> float:
    """Share of the answers that are what was expected and nothing else."""
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / len(expected)


def answers_table(rows: "Dataset", before: list[str], after: list[str]) -> Table:
    """The first rows: what was asked, what is right, and what the model wrote before and after."""
    table = Table(title="What it writes to docstrings that it was not trained on", title_justify="left")
    for name in ("docstring", "package", "before", "after"):
        table.add_column(name)
    for i in range(min(SHOWN, len(rows))):
        asked = rows[i]["prompt"].partition("\n")[0].removeprefix("Docstring: ")
        cells = (asked[:60], rows[i]["completion"], before[i], after[i])
        table.add_row(*(Text(" ".join(cell.split())) for cell in cells))  # not markup, whatever it writes
    return table
