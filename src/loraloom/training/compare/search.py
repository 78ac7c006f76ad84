"""Points of a search space, suggested by optuna (TPE), one study for each method.

A trial is one run with the first seed. Then each method's best trial is trained with the other seeds. The suggestions
follow from the seed and the results so far, so a search that was stopped makes the same ones again when it is started
again with the same `jobs`, and finds those runs finished.
"""

from collections.abc import Sequence
from typing import Any

from loraloom.errors import InputError
from loraloom.training.compare.config import Plan, Range, Search
from loraloom.training.compare.execution import Executor, Outcome
from loraloom.training.compare.results import validated
from loraloom.training.compare.runs import make_run

try:
    import optuna
except ImportError:
    raise InputError(
        "compare.search needs optuna: pip install 'loraloom[search]', or use learning_rates", code="missing-package"
    ) from None


def search(plan: Plan, space: Search, executor: Executor) -> list[Outcome]:
    """All runs of all methods' searches, with their outcomes.

    Raises:
        InputError: a suggested point makes a configuration wrong.
        RunInterruptedError: from the executor.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    studies = {
        entry.label: optuna.create_study(
            direction="minimize" if plan.lower_is_better else "maximize",
            sampler=optuna.samplers.TPESampler(seed=plan.seeds[0]),
        )
        for entry in plan.entries
    }
    outcomes: list[Outcome] = []
    # Each study asks for as many trials at a time as keep all jobs busy, and learns of them together.
    batch = -(-executor.jobs // len(plan.entries))
    for start in range(0, space.trials, batch):
        asked = [
            (entry, studies[entry.label].ask())
            for _ in range(min(batch, space.trials - start))
            for entry in plan.entries
        ]
        runs = [make_run(plan, entry, suggest(trial, space), plan.seeds[0]) for entry, trial in asked]
        ended = executor.run(runs)
        for (entry, trial), outcome in zip(asked, ended, strict=True):
            if outcome.result is None:
                studies[entry.label].tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                found = validated(outcome.result, plan.metric)
                studies[entry.label].tell(trial, outcome.result["after"][plan.metric] if found is None else found)
        outcomes += ended
    completed = {
        label: study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)) for label, study in studies.items()
    }
    best = [(entry, studies[entry.label].best_params) for entry in plan.entries if completed[entry.label]]
    return outcomes + executor.run([make_run(plan, entry, p, seed) for seed in plan.seeds[1:] for entry, p in best])


def suggest(trial: "optuna.Trial", space: Search) -> dict[str, Any]:
    """A value for each key of the space."""
    return {key: _suggest(trial, key, values) for key, values in space.space.items()}


def _suggest(trial: "optuna.Trial", key: str, values: Range | Sequence[Any]) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(key, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(key, values.low, values.high, log=values.log, step=int(values.step or 1))
    return trial.suggest_float(key, values.low, values.high, log=values.log, step=values.step)
