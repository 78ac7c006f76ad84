"""What the verbs share: reading options with tyro, quiet libraries, a console."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import tyro
from rich.console import Console

from loraloom.errors import InputError, did_you_mean


@dataclass
class Output:
    """How a verb talks; every verb has these."""

    quiet: bool = False
    """Show nothing but errors."""
    json: bool = False
    """Print the result as JSON on stdout, and everything else on stderr."""

    def console(self) -> Console:
        """Where the verb draws; of several processes that torchrun started, only the first one talks."""
        return Console(stderr=self.json, quiet=self.quiet or os.environ.get("RANK", "0") != "0")


def parse(verb: str, command: type, arguments: Sequence[str]) -> Any:
    """The verb's options as an instance of `command`.

    Raises:
        InputError: an option that the verb does not have.
        SystemExit: after `--help` (0), or on a value that tyro refuses (2).
    """
    known = ["--help", "-h", *(f"--{f.name}" for f in fields(command))]
    for word in arguments:  # tyro's own message takes ten lines
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("-") and option not in [name.replace("_", "-") for name in known]:
            raise InputError(f"unknown option {word!r}{did_you_mean(word, known)} See loraloom {verb} --help")
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
    warnings.filterwarnings("default", message="GaLore: ")  # ours, raised in a step that torch calls
