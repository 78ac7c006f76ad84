"""`loraloom evaluate FOLDER`"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from loraloom.cli.options import Output, parse, quiet_libraries
from loraloom.errors import InputError
from loraloom.text import score


@dataclass
class Evaluate(Output):
    """Load a finished run from its folder, as a program that uses it would, and evaluate it on its test set."""

    folder: tyro.conf.Positional[Path | None] = None
    """output.dir of the run."""


def main(arguments: Sequence[str]) -> None:
    """Evaluate, and show or print the metrics."""
    command: Evaluate = parse("evaluate", Evaluate, arguments)
    if command.folder is None:
        raise InputError("evaluate needs the folder of a finished run", code="usage")
    quiet_libraries()
    console = command.console()
    with console.status("Loading PyTorch and transformers"):
        from loraloom.training.display import results_table
        from loraloom.training.evaluate import evaluate_saved
    with console.status("Evaluating"):
        metrics = evaluate_saved(command.folder)
    console.print(results_table([(name.replace("_", " "), score(value)) for name, value in metrics.items()], "test"))
    if command.json:
        print(json.dumps(metrics))
