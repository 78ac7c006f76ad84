"""`loraloom predict FOLDER [FILE]`"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from loraloom.cli.options import Output, parse, quiet_libraries
from loraloom.errors import InputError

SHOWN = 3  # probabilities beside the answer


@dataclass
class Predict(Output):
    """Ask a finished run: labels with probabilities, numbers, tags, or text as it is written.

    With --json each answer is a line of JSON on stdout.
    """

    folder: tyro.conf.Positional[Path | None] = None
    """output.dir of the run."""
    file: tyro.conf.Positional[Path | None] = None
    """.jsonl, .csv, .tsv, .txt or .parquet with the columns that the run was trained on; answers are not needed."""
    text: str | None = None
    """Instead of FILE: one text, or for images the path of one."""
    text_pair: str | None = None
    """The second text of a pair."""
    chat: bool = False
    """Put the text as a user's message, through the tokenizer's chat template."""
    max_new_tokens: int = 128
    """Language models: the longest answer, in tokens."""
    temperature: float = 0.0
    """Language models: 0 takes the likeliest token each time; more is more random."""


def main(arguments: Sequence[str]) -> None:
    """Answer, and show or print the answers."""
    command: Predict = parse("predict", Predict, arguments)
    if command.folder is None or (command.file is None) == (command.text is None):
        raise InputError("predict needs the folder of a finished run, and FILE or --text", code="predict-what")
    quiet_libraries()
    console = command.console()
    with console.status("Loading PyTorch and the model"):
        from loraloom.training.predict import Predictor

        predictor = Predictor(command.folder, command.max_new_tokens, command.temperature)
    questions: list[Any] = [_typed(command)] if command.file is None else predictor.questions(command.file)
    if predictor.writes and not command.json:
        for question in questions:
            for piece in predictor.stream(question):
                console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
            console.print()
        return
    for question, answer in zip(questions, predictor.answers(questions), strict=True):
        if command.json:
            print(json.dumps({"input": question, **answer}), flush=True)
        else:
            _show(question, answer, console)


def _typed(command: Predict) -> Any:
    if command.chat:
        return [{"role": "user", "content": command.text}]
    return command.text if command.text_pair is None else [command.text, command.text_pair]


def _show(question: Any, answer: dict[str, Any], console: Console) -> None:
    """One line: the answer, the likeliest labels, and what was asked."""
    if "tags" in answer:
        said = " ".join(f"{word}/{tag}" for word, tag in zip(answer["words"], answer["tags"], strict=True))
    else:
        value = answer.get("label", answer.get("score", answer.get("labels")))
        said = ", ".join(value) or "none" if isinstance(value, list) else str(value)
        ranked = sorted(answer.get("probabilities", {}).items(), key=lambda item: -item[1])[:SHOWN]
        if ranked:
            said += f"  ({', '.join(f'{name} {p:.3f}' for name, p in ranked)})"
        said += f"  {question if isinstance(question, str) else ' | '.join(question)}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
