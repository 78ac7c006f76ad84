"""`loraloom quickstart`: a real encoder, real text, no hub; what the adapter gains, and that it survives a reload."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loraloom.cli import quickstart_llm
from loraloom.cli.options import Output, parse, quiet_libraries, save_report
from loraloom.errors import RunFailedError
from loraloom.training.config import (
    TRAINING_DEFAULTS,
    DataSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
)

FOLDER = "quickstart-run"


@dataclass
class Quickstart(Output):
    """Fine-tune a 22M-parameter encoder to tell which package of Python's standard library a docstring is from.

    Needs no hub and about three minutes on two cores. WeightLoRA finds the half of the adapters that matter and drops
    the rest. Prints the majority baseline, a linear probe on the frozen encoder, the fine-tuned model and the adapters
    that were kept, then reloads the adapter in a fresh process and evaluates it again.

    With --llm a language model of 135M parameters learns to write the answer; its answers are shown before and after.
    """

    llm: bool = False
    """Fine-tune a language model, SmolLM2-135M-Instruct of the extra `quickstart-llm`, in place of the encoder."""
    folder: str | None = None
    """Where the adapter and its numbers go. Default: quickstart-run, or quickstart-llm-run, which is replaced; another
    one must be new."""


def quickstart_config(folder: str) -> RunConfig:
    """WeightLoRA on MiniLM: half of the adapters stay; the rate is high because the adapters and the head are small."""
    return RunConfig(
        model=ModelSection(name="builtin:minilm", task="text-classification"),
        data=DataSection(path="stdlib-docstrings", max_length=64),
        method=MethodSection(name="weightlora", keep=0.5, r=16, lora_alpha=32),
        training={
            **TRAINING_DEFAULTS,
            "num_train_epochs": 3,
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "train_sampling_strategy": "group_by_length",
        },
        output=OutputSection(dir=folder, overwrite=folder == FOLDER),
    )


def main(arguments: Sequence[str]) -> None:
    """Run it all, and show or print the numbers.

    Raises:
        RunFailedError: the reloaded adapter does not give the accuracy that it had in training.
    """
    command: Quickstart = parse("quickstart", Quickstart, arguments)
    console = command.console()
    quiet_libraries()
    typed = shlex.join(["loraloom", "quickstart", *arguments])
    if command.llm:
        numbers = quickstart_llm.run(command.folder or quickstart_llm.FOLDER, typed, console)
    else:
        numbers = run(command.folder or FOLDER, typed, console)
    if command.json:
        print(json.dumps(numbers))


def run(folder: str, typed: str, console: Console) -> dict[str, float]:
    """Train and reload the encoder; the numbers that were shown.

    Args:
        folder: output.dir.
        typed: the command, for the card and the report.
        console: where to show them.
    """
    started = time.monotonic()
    config = quickstart_config(folder)
    with console.status("Loading PyTorch and transformers"):
        from loraloom.cli.train import show
        from loraloom.training.fit import train
    numbers = baselines(config, console)
    console.print(
        f"Majority class: accuracy {numbers['majority']:.4f}. "
        f"Linear probe on the frozen encoder: {numbers['probe']:.4f}.\n"
        f"Training {config.method.name} adapters; the metrics are on the test set.",
        highlight=False,
        soft_wrap=True,
    )
    result = train(config, console=console, command=typed)
    show(result, console)
    with console.status("Reloading the adapter in a fresh process"):
        numbers["fine_tuned"] = result.after["accuracy"]
        numbers["reloaded"] = evaluate_in_fresh_process(folder)["accuracy"]
    numbers["seconds"] = round(time.monotonic() - started, 1)
    if numbers["reloaded"] != numbers["fine_tuned"]:
        raise RunFailedError(
            f"the reloaded adapter has accuracy {numbers['reloaded']:.4f}, in training {numbers['fine_tuned']:.4f}",
            code="not-verified",
        )
    show_end(numbers, folder, console)
    from loraloom.report.builders import report_of_run

    compared = {"majority class": numbers["majority"], "linear probe": numbers["probe"]}
    output = Path(config.output.dir)
    save_report(report_of_run(output, typed, compared), output / "report", console)
    return numbers


def baselines(config: RunConfig, console: Console) -> dict[str, float]:
    """Test accuracy of always answering the most frequent class, and of logistic regression on the frozen encoder."""
    import torch
    from transformers import AutoModel

    from loraloom.training.data import load_data
    from loraloom.training.model import load_processor, model_path, resolve_max_length
    from loraloom.training.probe import linear_probe, mean_pooled

    with console.status("Reading the docstrings of Python's standard library"):
        data = load_data(config.data, config.model.task)
    console.print(
        f"{len(data.train)} docstrings to train on, {len(data.test)} to test on, from {len(data.label_names)} packages:"
        f" {', '.join(data.label_names)}.\nFor example, from {data.label_names[data.test[0]['label']]}: "
        f"{data.test[0]['text']!r}",
        highlight=False,
        soft_wrap=True,
    )
    with console.status("Fitting a linear probe on the frozen encoder"):
        tokenizer = load_processor(config.model)
        encoder = AutoModel.from_pretrained(model_path(config.model.name))
        labels = {part: torch.tensor(rows["label"][:]) for part, rows in (("train", data.train), ("test", data.test))}
        texts = data.train["text"][:] + data.test["text"][:]
        features = mean_pooled(encoder, tokenizer, texts, resolve_max_length(config, tokenizer))
        probe = linear_probe(features[: len(data.train)], labels["train"], len(data.label_names))
        predictions = probe(features[len(data.train) :]).argmax(-1)
    majority = labels["train"].mode().values
    return {
        "majority": (labels["test"] == majority).float().mean().item(),
        "probe": (labels["test"] == predictions).float().mean().item(),
    }


def evaluate_in_fresh_process(folder: str) -> dict[str, float]:
    """The metrics that `loraloom evaluate` gives: nothing of this process is left in them."""
    command = [sys.executable, "-m", "loraloom.cli.main", "evaluate", folder, "--json", "--quiet"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise RunFailedError(f"reloading {folder} failed: {outcome.stderr.strip()}", code="not-verified")
    return json.loads(outcome.stdout)


def show_end(numbers: dict[str, float], folder: str, console: Console) -> None:
    """The numbers side by side, what was written, and what to type next."""
    from loraloom.training.display import results_table

    rows = [
        ("majority class", f"{numbers['majority']:.4f}"),
        ("linear probe, frozen encoder", f"{numbers['probe']:.4f}"),
        ("fine-tuned adapter", f"{numbers['fine_tuned']:.4f}"),
        ("the same, reloaded in a fresh process", f"{numbers['reloaded']:.4f}"),
    ]
    console.print(results_table(rows, "test accuracy"))
    console.print(
        f"{folder}/ holds the adapter (adapter_model.safetensors, adapter_config.json), its tokenizer, the numbers "
        f"(metrics.json) and the full configuration (resolved.yaml). {numbers['seconds']:.0f} s in all.\n\n"
        f"Next:\n"
        f"  loraloom evaluate {folder}\n"
        f"  loraloom train {folder}/resolved.yaml --method.name weightlora+ --output.dir wider-run\n"
        f"  loraloom train {folder}/resolved.yaml --data.path your.jsonl --output.dir your-run",
        highlight=False,
        soft_wrap=True,
    )
