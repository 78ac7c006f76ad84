"""`loraloom train RUN.yaml --section.key value ...`"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import tyro
from rich.console import Console

from loraloom.cli.help import sectioned_help
from loraloom.cli.launch import launch
from loraloom.cli.options import Saving, first_process, parse, quiet_libraries, save_report
from loraloom.errors import InputError, RunInterruptedError
from loraloom.text import readable_bytes, score
from loraloom.training.config import (
    SECTIONS,
    DataSection,
    Method,
    MethodSection,
    ModelSection,
    OptimizerSection,
    OutputSection,
)
from loraloom.training.load import load_config

if TYPE_CHECKING:
    from loraloom.training.result import RunResult


# The sections are fields for the help alone: `load_config` reads their values as YAML, as it reads the file.
@dataclass
class Train(Saving):
    """Fine-tune a model as RUN.yaml says.

    Every key of its sections can also be given as --section.key value, which wins over the file.
    """

    run: tyro.conf.Positional[Path | None] = None
    """RUN.yaml; every key has a default."""
    resume: bool = False
    """Go on from the last complete checkpoint in output.dir."""
    nproc: int = 1
    """Processes to train with on this machine, one per GPU, or on the CPU. Across machines: torchrun."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    method: MethodSection = field(default_factory=MethodSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    output: OutputSection = field(default_factory=OutputSection)


def main(arguments: Sequence[str]) -> None:
    """Train, and show or print the result."""
    run_verb("train", Train, arguments)


def run_verb(verb: str, options_of_verb: type, arguments: Sequence[str], method: Method | None = None) -> None:
    """A verb that is a run: train, and show or print the result.

    Args:
        verb: its name, for messages.
        options_of_verb: its options, with those of `Output`, `run`, `resume` and `nproc`.
        arguments: the words after the verb.
        method: the only method.name of the verb; None: any.
    """
    sections = [name for name in SECTIONS if name in get_type_hints(options_of_verb)]
    text = sectioned_help(verb, sections, arguments, lambda: parse(verb, options_of_verb, ["--help"]))
    if text is not None:
        print(text, end="")
        return
    options, overrides = split_overrides(arguments)
    command = parse(verb, options_of_verb, options)
    if command.run is None and not overrides:
        raise InputError(f"{verb} needs a RUN.yaml, or --section.key value; see loraloom {verb} --help", code="usage")
    config = load_config(command.run, overrides, method)
    if method and config.method.name != method:
        raise InputError(
            f"{verb} needs method.name {method!r}, not {config.method.name!r}: remove it, or use train",
            code="wrong-verb",
        )
    if command.nproc != 1:
        launch(verb, _without_nproc(arguments), command.nproc)
        return
    quiet_libraries()
    console = command.console()
    typed = shlex.join(["loraloom", verb, *arguments])
    with console.status("Loading PyTorch and transformers"):
        from loraloom.training.fit import train
    try:
        result = train(config, resume=command.resume, console=console, command=typed)
    except RunInterruptedError as error:
        again = shlex.join(["loraloom", verb, *(word for word in arguments if word != "--resume"), "--resume"])
        raise RunInterruptedError(f"{error}; go on with: {again}", code="interrupted") from None
    show(result, console)
    if command.report is not None and first_process():
        from loraloom.report.builders import report_of_run

        save_report(report_of_run(Path(config.output.dir), typed), command.report, console)
    command.publish(config.output.dir, console)
    if command.json and first_process():
        print(json.dumps(dataclasses.asdict(result)))


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    words = list(arguments)
    for i, word in enumerate(words):
        if word == "--nproc":
            return words[:i] + words[i + 2 :]
        if word.startswith("--nproc="):
            return words[:i] + words[i + 1 :]
    return words


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separate `--section.key value` and `--section.key=value` from the verb's own options.

    Raises:
        InputError: the last key has no value.
    """
    options, overrides = [], []
    words = iter(arguments)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and "." in key):
            options.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                raise InputError(f"{word} has no value; expected {word} VALUE", code="option-value")
            value = following
        overrides.append((key, value))
    return options, overrides


def show(result: "RunResult", console: Console) -> None:
    """The table of results, and where they are."""
    from loraloom.training.display import adapters_table, results_table, weights_table

    if result.adapters is not None:
        console.print(adapters_table(result.adapters))
    if result.composition is not None:
        console.print(weights_table(result.composition))
    rows = [
        (name.replace("_", " "), f"{score(result.before[name])} -> {score(value)}")
        for name, value in result.after.items()
    ]
    if result.retention is not None:
        after = result.retention["after"]
        rows += [
            (f"retention: {name.replace('_', ' ')}", f"{score(value)} -> {score(after[name])}")
            for name, value in result.retention["before"].items()
        ]
    share = result.trainable_parameters / result.total_parameters
    rows += [
        ("trainable parameters", f"{result.trainable_parameters:,} of {result.total_parameters:,} ({share:.2%})"),
        ("tokens per second", f"{result.tokens_per_second:,.0f}"),
        ("peak memory", readable_bytes(result.peak_memory_bytes)),
        ("wall time", f"{result.wall_time_seconds:.0f} s"),
    ]
    console.print(results_table(rows, f"{result.method}, before -> after training"))
    console.print(
        f"Saved in {result.output_dir}: the weights, metrics.json, resolved.yaml", highlight=False, soft_wrap=True
    )
    if result.composition is not None:
        console.print(
            f"In {result.composition.portable}: the same as an ordinary LoRA of rank {result.composition.rank}",
            highlight=False,
            soft_wrap=True,
        )
