"""`loraloom init [TASK]`"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import tyro

from loraloom.cli.options import Output, parse
from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import Task


@dataclass
class Init(Output):
    """Write a commented RUN.yaml to start from."""

    task: tyro.conf.Positional[str] = "text-classification"
    """text-classification, multi-label, text-regression, token-classification, seq2seq-lm, causal-lm, preference,
    image-classification or vision-language."""
    out: Path = Path("RUN.yaml")
    """The file to write; it must be new."""


def main(arguments: Sequence[str]) -> None:
    """Write the file, and say what to do with it."""
    command: Init = parse("init", Init, arguments)
    tasks = get_args(Task)
    if command.task not in tasks:
        raise InputError(
            f"task {command.task!r} is none of {', '.join(tasks)}{did_you_mean(command.task, tasks)}",
            code="unknown-task",
        )
    write_new(command.out, starter_of(command.task))
    command.console().print(
        f"{command.out}: name your model and data in it, then: loraloom train {command.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def starter_of(task: str) -> str:
    """The task's RUN.yaml."""
    from loraloom.training.starters import starter

    return starter(task)  # type: ignore[arg-type]


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        InputError: it is there, or its folder is not.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path} is there already: give another --out", code="file-exists") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})", code="not-writable") from None
