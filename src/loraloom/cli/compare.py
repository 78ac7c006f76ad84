"""`loraloom compare COMPARE.yaml`"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from loraloom.cli.options import Reporting, parse, save_report
from loraloom.cli.train import split_overrides
from loraloom.errors import InputError, RunInterruptedError


@dataclass
class Compare(Reporting):
    """Train methods x learning rates x seeds on one task, each run in a process of its own, and compare.

    Runs that are finished already are not done again, so the same command goes on after a Ctrl-C or a failure; given on
    several machines that share output.dir, it divides the runs among them. Every key of COMPARE.yaml can also be given
    as --section.key value, which wins over the file.
    """

    file: tyro.conf.Positional[Path | None] = None
    """COMPARE.yaml: the sections of RUN.yaml and a section `compare`; see docs/compare.md."""
    jobs: int = 1
    """How many runs to train at a time, each on a GPU of its own as far as there are free ones. They share the machine:
    speeds are then not those of a run alone."""


def main(arguments: Sequence[str]) -> None:
    """Compare, and show or print the result."""
    options, overrides = split_overrides(arguments)
    command: Compare = parse("compare", Compare, options)
    if command.file is None:
        raise InputError("compare needs a COMPARE.yaml; see loraloom compare --help", code="usage")
    if command.jobs < 1:
        raise InputError(f"--jobs {command.jobs}: expected 1 or more", code="out-of-range")
    from loraloom.training.compare import RESULT, compare, load_plan
    from loraloom.training.compare.display import cost_table, quality_table
    from loraloom.training.compare.verdict import verdict

    console = command.console()
    plan = load_plan(command.file, overrides)
    try:
        comparison = compare(plan, jobs=command.jobs, console=console)
    except RunInterruptedError as error:
        again = shlex.join(["loraloom", "compare", *arguments])
        raise RunInterruptedError(f"{error}; go on with: {again}", code="interrupted") from None
    console.print(quality_table(comparison), cost_table(comparison))
    console.print(verdict(comparison), highlight=False, soft_wrap=True, markup=False)
    for note in comparison.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    console.print(f"Saved in {comparison.folder}: {RESULT}, runs/", highlight=False, soft_wrap=True)
    if command.report is not None:
        from loraloom.report.builders.comparison import comparison_report

        typed = shlex.join(["loraloom", "compare", *arguments])
        save_report(comparison_report(comparison, typed), command.report, console)
    if command.json:
        print(json.dumps(comparison.to_dict()))
