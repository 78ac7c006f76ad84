"""What the verbs share: reading options with tyro, quiet libraries, a console."""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from loraloom.errors import InputError
from loraloom.progress import Progress
from loraloom.text import did_you_mean

if TYPE_CHECKING:
    from loraloom.adapter.made import MadeReport
    from loraloom.report import Report

QUIET_SECONDS = 2.0  # work that is done sooner shows no bar


@dataclass
class Output:
    """How a verb talks; every verb has these."""

    quiet: bool = False
    """Show nothing but errors."""
    json: bool = False
    """Print the result as JSON on stdout, and everything else on stderr."""

    def console(self) -> Console:
        """Where the verb draws; of several processes that torchrun started, only the first one talks."""
        return Console(stderr=self.json, quiet=self.quiet or not first_process())


def first_process() -> bool:
    """Whether this is the first, or the only one, of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Reporting(Output):
    """What verbs with a result to look at have besides."""

    report: Path | None = None
    """Folder for report.json, the page report.html, and PNGs of its figures."""


@dataclass
class Saving(Reporting):
    """What verbs that write a folder have besides."""

    push: str | None = None
    """Repository on the Hugging Face hub to upload the result to; made if it is not there."""
    private: bool = False
    """Make that repository private."""

    def publish(self, folder: str | Path, console: Console) -> None:
        """Upload what was written, if that was asked for.

        Raises:
            RunFailedError: the hub cannot be reached, or refuses; the folder is whole.
        """
        if self.push is None or not first_process():
            return
        from loraloom.io.hub import push_folder

        with console.status(f"Uploading to {self.push}"):
            address = push_folder(Path(folder), self.push, self.private)
        console.print(f"Pushed: {address}", highlight=False, soft_wrap=True, markup=False)

    def finish(self, report: "MadeReport", lines: Sequence[str], console: Console) -> None:
        """The end of a verb that made an adapter: what is said of it, the upload, and the JSON.

        Raises:
            RunFailedError: see :meth:`publish`.
        """
        console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
        self.publish(report.path, console)
        if self.json:
            print(json.dumps(report.to_dict()))


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """A progress of the library as bars, one for each description, from two seconds on and on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def progress(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total, visible=False), time.monotonic()
            task, since = tasks[description]
            bars.update(task, completed=done, total=total, visible=time.monotonic() - since > QUIET_SECONDS)

        yield progress


def save_report(report: "Report", directory: str | Path, console: Console) -> None:
    """Write the report into the folder, and say where its page is, or how to install what would draw it."""
    from loraloom.report import write_report

    with console.status("Writing the report"):
        written = write_report(report, directory)
    if written.missing:
        console.print(written.missing, highlight=False, soft_wrap=True)
    console.print(f"Report: {written.page or written.data}", highlight=False, soft_wrap=True, markup=False)


def parse(verb: str, command: type, arguments: Sequence[str]) -> Any:
    """The verb's options as an instance of `command`.

    Raises:
        InputError: an option that the verb does not have.
        SystemExit: after `--help` (0), or on a value that tyro refuses (2).
    """
    known = ["--help", "-h", *(f"--{f.name}" for f in fields(command))]
    for word in arguments:  # tyro's own message takes ten lines
        option = word.partition("=")[0].replace("_", "-")
        number = option[1:2].isdigit()
        if option.startswith("-") and not number and option not in [name.replace("_", "-") for name in known]:
            raise InputError(
                f"unknown option {word!r}{did_you_mean(word, known)} See loraloom {verb} --help", code="unknown-option"
            )
    return tyro.cli(
        command,
        prog=f"loraloom {verb}",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
        use_underscores=True,
    )


def quiet_libraries() -> None:
    """Let only errors of the libraries through: their notices are about their own defaults, not the user's input.

    Called before they are imported; progress is shown by loraloom itself.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "accelerate", "datasets", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|peft|accelerate|datasets|bitsandbytes)(\.|$)")
    warnings.filterwarnings("default", message="GaLore: |bfloat16 weights lose ")  # ours, raised where torch calls
