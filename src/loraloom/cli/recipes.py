"""`loraloom recipes [NAME]`"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import tyro

from loraloom.cli.init import write_new
from loraloom.cli.options import Output, parse
from loraloom.errors import InputError
from loraloom.text import did_you_mean


@dataclass
class Recipes(Output):
    """List the experiments of the papers as RUN.yaml, or copy one."""

    name: tyro.conf.Positional[str | None] = None
    """The recipe to copy."""
    out: Path | None = None
    """The file to write; default: NAME.yaml here."""


def main(arguments: Sequence[str]) -> None:
    """List, or copy."""
    command: Recipes = parse("recipes", Recipes, arguments)
    known = recipes()
    console = command.console()
    if command.name is None:
        for name, text in known.items():
            console.print(f"{name:<28}{title(text)}", highlight=False, markup=False, soft_wrap=True)
        if command.json:
            print(json.dumps({name: title(text) for name, text in known.items()}))
        return
    if command.name not in known:
        raise InputError(
            f"recipe {command.name!r} is none of {', '.join(known)}{did_you_mean(command.name, known)}",
            code="unknown-recipe",
        )
    out = command.out or Path(f"{command.name}.yaml")
    write_new(out, known[command.name])
    console.print(f"{out}: name your data in it, then: loraloom train {out}", highlight=False, soft_wrap=True)


def recipes() -> dict[str, str]:
    """Every recipe's text, by name."""
    found = [path for path in files("loraloom.training.recipes").iterdir() if path.name.endswith(".yaml")]
    return {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8")
        for path in sorted(found, key=lambda p: p.name)
    }


def title(text: str) -> str:
    """A recipe's first line, without the comment sign."""
    return text.splitlines()[0].removeprefix("#").strip()
