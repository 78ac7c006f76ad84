"""A comparison: which runs it does, what it makes of their numbers, and how it goes on after anything at all."""

import json
import math
import os
import signal

import optuna
import pytest
from rich.console import Console

from loraloom.errors import RunFailedError, RunInterruptedError
from loraloom.training.compare import RESULT, compare, execution, load_plan
from loraloom.training.compare.display import cost_table, quality_table
from loraloom.training.compare.runs import RESOLVED, finished
from tests.refusals import coded

from .support import FakeProcess, Launcher

GRID = "{methods: [lora, moslora, dora], seeds: [0, 1, 2], learning_rates: [1e-4, 1e-3, 3e-3]}"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(execution, "POLL_SECONDS", 0)


@pytest.fixture
def plan(tmp_path):
    def build(compare=GRID):
        path = tmp_path / "COMPARE.yaml"
        path.write_text(f"method: {{r: 4}}\noutput: {{dir: {tmp_path / 'out'}}}\ncompare: {compare}")
        return load_plan(path)

    return build


def by_label(comparison):
    return {method.label: method for method in comparison.methods}


def text_of(*renderables):
    console = Console(width=200, file=None, record=True, quiet=False)
    with console.capture() as captured:
        console.print(*renderables)
    return captured.get()


def test_grid(plan):
    launcher = Launcher()
    comparison = compare(plan(), start=launcher)
    assert len(launcher.started) == len({run.folder for run in launcher.started}) == 27
    assert [run.seed for run in launcher.started] == [0] * 9 + [1] * 9 + [2] * 9  # every method in the first third
    assert launcher.most_at_a_time == 1
    methods = by_label(comparison)
    lora, moslora = methods["lora"], methods["moslora"]
    assert lora.best.point == {"training.learning_rate": 1e-3}
    assert len(lora.candidates) == 3
    assert lora.best.mean == pytest.approx(0.81)
    assert lora.best.spread == pytest.approx(0.01)
    assert lora.versus_baseline is None
    assert moslora.versus_baseline.difference == pytest.approx(0.05)
    assert (moslora.versus_baseline.n, moslora.versus_baseline.p_sign_flip) == (3, 0.25)
    assert (lora.trainable_parameters, lora.peak_memory_bytes, lora.failed) == (400, 2**20 + 2, 0)
    assert (lora.tokens_per_second, lora.wall_time_seconds, lora.retention) == (pytest.approx(11), 2, None)


def test_notes_say_what_the_numbers_cannot(plan):
    notes = "\n".join(compare(plan(), start=Launcher(), jobs=2).notes)
    assert "chosen by its mean accuracy on the test set that is reported here" in notes
    assert "With 3 paired seeds the exact p cannot be below 0.25" in notes
    assert "not corrected for 2 comparisons" in notes
    assert "Up to 2 runs shared the machine" in notes
    assert "lowest" not in notes
    assert "highest" not in notes
    edge = "{methods: [lora], learning_rates: [1e-4, 3e-4], seeds: [0]}"
    assert "lora: its best learning rate, 0.0003, is the highest tried" in "\n".join(
        compare(plan(edge), start=Launcher()).notes
    )
    single = "{methods: [lora, dora], learning_rates: [1e-3], seeds: [0, 1, 2, 3, 4, 5]}"
    assert compare(plan(single), start=Launcher()).notes == []


def test_the_json_is_the_result(plan, tmp_path):
    comparison = compare(plan(), start=Launcher())
    saved = json.loads((tmp_path / "out" / RESULT).read_text())
    assert saved == json.loads(json.dumps(comparison.to_dict()))
    assert saved["format_version"] == 1
    assert len(saved["runs"]) == 27
    assert saved["runs"][0]["result"]["after"]["accuracy"] == pytest.approx(0.71)
    assert saved["methods"][0]["best"]["values"] == pytest.approx({"0": 0.8, "1": 0.81, "2": 0.82})


def test_tables(plan):
    comparison = compare(plan(), start=Launcher())
    text = text_of(quality_table(comparison), cost_table(comparison))
    assert "accuracy on the test set (higher is better), mean ± spread over seeds" in text
    for part in ("0.8600 ± 0.0100", "+0.0500", "-0.0500", "0.250", "1.0 MiB"):
        assert part in text
    assert "retention" not in text


def test_retention_is_shown_where_runs_report_it(plan):
    def behaviour(config):
        after = {"accuracy": 0.5 + 0.1 * config.training["seed"], "macro_f1": 0.0}
        return 0, "", {"retention": {"before": {"accuracy": 0.9, "macro_f1": 0.0}, "after": after}}

    comparison = compare(plan(), start=Launcher(behaviour))
    dora = by_label(comparison)["dora"]
    assert (dora.retention_before, dora.retention) == (pytest.approx(0.9), pytest.approx(0.6))
    text = text_of(cost_table(comparison))
    assert "retention: accuracy" in text
    assert "0.9000 -> 0.6000" in text


def test_a_run_that_diverged_counts_as_one_without_a_result(plan):
    def behaviour(config):
        broken = config.method.name == "dora" and config.training["seed"] == 0
        return 0, "", {"after": {"loss": 1.0, "accuracy": math.nan if broken else 0.5, "macro_f1": 0.5}}

    comparison = compare(plan(), start=Launcher(behaviour))
    dora = by_label(comparison)["dora"]
    assert set(dora.best.values) == {1, 2}
    assert dora.failed == len(dora.candidates)
    assert dora.versus_baseline.n == 2
    assert dora.versus_baseline.p_sign_flip == 1.0


def test_the_lowest_loss_wins(plan):
    comparison = compare(plan("{methods: [lora], learning_rates: [1e-4, 1e-3], metric: loss}"), start=Launcher())
    assert comparison.lower_is_better
    assert comparison.methods[0].best.point == {"training.learning_rate": 1e-3}


def test_finished_runs_are_skipped_and_unfinished_ones_redone(plan):
    first = Launcher()
    before = compare(plan(), start=first)
    killed, broken, other = (run.folder for run in first.started[:3])
    (killed / "metrics.json").unlink()
    (broken / "metrics.json").write_text("{")
    resolved = other / RESOLVED
    resolved.write_text(resolved.read_text().replace("lora_alpha: 32", "lora_alpha: 64"))
    second = Launcher()
    after = compare(plan(), start=second)
    assert [run.folder for run in second.started] == [killed, broken, other]
    assert after.to_dict() == before.to_dict()
    third = Launcher()
    compare(plan(GRID.replace("[0, 1, 2]", "[0, 1, 2, 3]")), start=third)
    assert {run.seed for run in third.started} == {3}


def test_a_moved_folder_keeps_its_runs(plan, tmp_path):
    compare(plan(), start=Launcher())
    (tmp_path / "out").rename(tmp_path / "moved")
    launcher = Launcher()
    path = tmp_path / "COMPARE.yaml"
    compare(load_plan(path, [("output.dir", str(tmp_path / "moved"))]), start=launcher)
    assert launcher.started == []


def test_jobs_run_at_a_time_and_share_the_cores(plan, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = Launcher()
    together = compare(plan(), start=launcher, jobs=4)
    assert launcher.most_at_a_time == 4
    assert launcher.environments[0] == {"OMP_NUM_THREADS": "2"}
    alone = compare(plan(), start=Launcher())
    assert together.to_dict() | {"notes": None} == alone.to_dict() | {"notes": None}


def test_failures_are_reported_and_not_fatal(plan):
    def behaviour(config):
        diverges = config.method.name == "dora" and config.training["learning_rate"] == 1e-3 and config.training["seed"]
        return (1, "...\nloraloom: loss is nan at step 5\n", {}) if diverges else (0, "", {})

    console = Console(width=300, record=True)
    with console.capture() as captured:
        comparison = compare(plan(), start=Launcher(behaviour), console=console)
    dora = by_label(comparison)["dora"]
    assert dora.failed == 2
    # 1e-3 has the best mean, of the one seed at which it came through: it does not win.
    assert dora.best.point == {"training.learning_rate": 1e-4}
    failed = [outcome for outcome in comparison.outcomes if outcome.error]
    assert [outcome.error for outcome in failed] == [
        f"loss is nan at step 5; see {outcome.run.folder / 'log.txt'}" for outcome in failed
    ]
    lines = captured.get().splitlines()
    assert len(lines) == 27
    assert sum("failed: loss is nan at step 5" in line for line in lines) == 2
    again = Launcher()
    assert by_label(compare(plan(), start=again))["dora"].failed == 0
    assert len(again.started) == 2


def test_wrong_input_is_met_once(plan):
    def behaviour(config):
        return (2, "loraloom: no such module\n", {}) if config.method.name == "dora" else (0, "", {})

    launcher = Launcher(behaviour)
    comparison = compare(plan(), start=launcher)
    assert len(launcher.started) == 18 + 1
    assert by_label(comparison)["dora"].failed == 9
    assert by_label(comparison)["dora"].best is None
    errors = {outcome.error for outcome in comparison.outcomes if outcome.error}
    assert len(errors) == 2
    assert all("no such module" in error for error in errors)
    assert "9 failed" in text_of(quality_table(comparison), cost_table(comparison))


def test_a_run_that_was_killed_says_so(plan):
    comparison = compare(plan(), start=Launcher(lambda c: (-9 if c.method.name == "dora" else 0, "", {})))
    error = next(outcome.error for outcome in comparison.outcomes if outcome.error)
    assert error.startswith("killed by signal 9 (out of memory?); see ")


def test_without_a_finished_run_the_comparison_failed(plan):
    with pytest.raises(RunFailedError, check=coded("no-finished-run", "27", "log.txt")):
        compare(plan(), start=Launcher(lambda config: (1, "", {})))


def test_without_a_baseline_there_is_no_test(plan):
    comparison = compare(plan(), start=Launcher(lambda c: (1 if c.method.name == "lora" else 0, "", {})))
    assert [method.versus_baseline for method in comparison.methods] == [None] * 3
    assert by_label(comparison)["dora"].best is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_stopped_it_stops_its_processes(plan, number):
    class Interrupting(FakeProcess):
        def poll(self):
            code = super().poll()
            if self.polls == 1:
                os.kill(os.getpid(), number)
            return code

    launcher = Launcher()

    def start(run, environment):
        process = launcher(run, environment)
        if len(launcher.processes) == 4:
            process = launcher.processes[-1] = Interrupting(0, lambda: None)
        return process

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunInterruptedError, check=coded("interrupted", "27")):
        compare(plan(), start=start, jobs=2)
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = [process for process in launcher.processes if process.signals]
    assert stopped == launcher.processes[2:]
    assert all(process.signals == ["terminate"] for process in stopped)
    again = Launcher()
    compare(plan(), start=again)
    assert len(again.started) == 25


def test_a_process_that_does_not_stop_is_killed(plan, monkeypatch):
    monkeypatch.setattr(execution, "GRACE_SECONDS", 0)
    deaf = FakeProcess(0, lambda: None, deaf=True)
    deaf.polls = 2  # so it does not end by itself either
    processes = iter([deaf])

    def start(run, environment):
        for process in processes:
            return process
        raise KeyboardInterrupt  # at the second run

    with pytest.raises(RunInterruptedError, check=coded("interrupted", "27")):
        compare(plan(), start=start, jobs=2)
    assert deaf.signals == ["terminate", "kill"]


SEARCH = (
    "{methods: [lora, moslora], seeds: [3, 4], search: "
    "{trials: 12, learning_rate: {low: 1e-4, high: 1e-2, log: true}, method.r: {low: 2, high: 8}}}"
)


def test_search(plan):
    launcher = Launcher()
    comparison = compare(plan(SEARCH), start=launcher)
    for method in comparison.methods:
        trials = [run for run in launcher.started if run.label == method.label and run.seed == 3]
        assert len(trials) == 12
        assert {key for run in trials for key in run.point} == {"training.learning_rate", "method.r"}
        assert all(1e-4 <= run.config.training["learning_rate"] <= 1e-2 for run in trials)
        assert {type(run.config.method.r) for run in trials} == {int}
        best = min(trials, key=lambda run: abs(run.config.training["learning_rate"] - 1e-3))  # of the fake metrics
        assert method.best.point == best.point
        assert [*method.best.values] == [3, 4]
        assert [run.point for run in launcher.started if run.label == method.label and run.seed == 4] == [best.point]
    assert "The search used seed 3 alone" in "\n".join(comparison.notes)
    assert "method.r" in text_of(quality_table(comparison))


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_search_that_was_stopped_suggests_the_same_again(plan, jobs):
    first = Launcher()
    before = compare(plan(SEARCH), start=first, jobs=jobs)
    for run in first.started[7:]:
        (run.folder / "metrics.json").unlink()
    second = Launcher()
    after = compare(plan(SEARCH), start=second, jobs=jobs)
    assert {run.folder for run in second.started} == {run.folder for run in first.started[7:]}
    assert after.to_dict() == before.to_dict()


def test_a_trial_that_fails_is_not_chosen(plan):
    launcher = Launcher(lambda config: (int(config.method.r > 4), "", {}))
    comparison = compare(plan(SEARCH), start=launcher)
    assert all(method.best.point["method.r"] <= 4 and method.failed > 0 for method in comparison.methods)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_choices(plan):
    space = "{trials: 6, method.r: [2, 4], method.use_rslora: [true, false]}"
    launcher = Launcher()
    compare(plan(f"{{methods: [lora], seeds: [0], search: {space}}}"), start=launcher)
    assert {run.config.method.r for run in launcher.started} <= {2, 4}
    assert len(launcher.started) <= 4  # a point that comes again is not trained again
    assert all(finished(run) for run in launcher.started)


def test_points_are_chosen_by_the_validation_set_and_judged_by_the_test_set(plan):
    def behaviour(config):
        return 0, "", {"validation": {"accuracy": 0.9 if config.training["learning_rate"] == 3e-3 else 0.1}}

    found = compare(
        plan("{methods: [lora, dora], learning_rates: [1e-3, 3e-3], seeds: [0]}"), start=Launcher(behaviour)
    )
    for method in found.methods:
        assert method.best.point["training.learning_rate"] == 3e-3
        assert method.best.mean == min(candidate.mean for candidate in method.candidates)
    assert "on the validation set" in found.notes[0]
