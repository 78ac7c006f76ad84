"""Methods side by side on one task: a plan from COMPARE.yaml, its runs, what they say. Imports no torch."""

import json

from rich.console import Console

from loraloom.errors import RunFailedError
from loraloom.io.files import write_text_atomically
from loraloom.training.compare.config import LEARNING_RATE, Plan, load_plan
from loraloom.training.compare.execution import Executor, Launch, Outcome
from loraloom.training.compare.results import Comparison, summarise
from loraloom.training.compare.runs import launch, make_run

__all__ = ["Comparison", "Plan", "compare", "load_plan"]
RESULT = "comparison.json"


def compare(plan: Plan, *, jobs: int = 1, console: Console | None = None, start: Launch = launch) -> Comparison:
    """Train what `plan` asks for and is not finished, each run in a process of its own, and compare.

    Writes comparison.json into the plan's folder. A run that fails is reported and the others go on. Started more than
    once, also on several machines that share the folder, comparisons divide the runs among themselves.

    Args:
        plan: from `load_plan`.
        jobs: how many runs to train at a time.
        console: where to show progress; default is none.
        start: starts a run; for tests.

    Raises:
        InputError: optuna is missing.
        RunFailedError: not one run finished.
        RunInterruptedError: Ctrl-C or SIGTERM; the runs are stopped, those that are finished stay so.
    """
    console = console or Console(quiet=True)
    outcomes = _search(plan, jobs, console, start) if plan.search else _grid(plan, jobs, console, start)
    comparison = summarise(plan, outcomes, jobs)
    write_text_atomically(plan.folder / RESULT, json.dumps(comparison.to_dict(), indent=2) + "\n")
    if all(outcome.result is None for outcome in outcomes):
        raise RunFailedError(
            f"none of {len(outcomes)} runs finished; the first one: {outcomes[0].error}", code="no-finished-run"
        )
    return comparison


def _grid(plan: Plan, jobs: int, console: Console, start: Launch) -> list[Outcome]:
    # Seed by seed, so that a comparison that is stopped early has every method in it.
    points = [(entry, {LEARNING_RATE: rate}) for entry in plan.entries for rate in entry.learning_rates]
    runs = [make_run(plan, entry, point, seed) for seed in plan.seeds for entry, point in points]
    return Executor(jobs, len(runs), console, start).run(runs)


def _search(plan: Plan, jobs: int, console: Console, start: Launch) -> list[Outcome]:
    from loraloom.training.compare.search import search  # needs optuna

    assert plan.search is not None
    total = len(plan.entries) * (plan.search.trials + len(plan.seeds) - 1)
    return search(plan, plan.search, Executor(jobs, total, console, start))
