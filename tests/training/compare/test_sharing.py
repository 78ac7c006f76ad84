"""Runs of a comparison over GPUs, and over several comparisons that work in one folder."""

import os
import threading
from collections import Counter

import pytest
from filelock import FileLock

from loraloom.training.compare import compare, execution, load_plan
from loraloom.training.compare.config import LEARNING_RATE
from loraloom.training.compare.runs import make_run
from loraloom.training.compare.sharing import CLAIM, claim, free_gpus, least_busy
from loraloom.training.folder import LOCK

from .support import Launcher

SMI = """#!/bin/sh
case "$1" in
  --query-gpu=uuid) printf 'GPU-a\\nGPU-b\\nGPU-c\\n' ;;
  --query-compute-apps=gpu_uuid) printf '{busy}' ;;
esac
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(execution, "POLL_SECONDS", 0)
    monkeypatch.setattr(execution, "ELSEWHERE_SECONDS", 0)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "COMPARE.yaml"
    compared = "{methods: [lora, moslora, dora], seeds: [0, 1, 2]}"
    path.write_text(f"method: {{r: 4}}\noutput: {{dir: {tmp_path / 'out'}}}\ncompare: {compared}")
    return load_plan(path)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the path that knows three GPUs, those of `busy` with a process."""

    def put(busy=""):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(SMI.format(busy=busy))
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


@pytest.mark.parametrize(
    ("busy", "named", "expected"),
    [
        ("", None, ["GPU-a", "GPU-b", "GPU-c"]),
        ("GPU-b\\n", None, ["GPU-a", "GPU-c"]),
        ("GPU-b\\nGPU-b\\nGPU-a\\n", None, ["GPU-c"]),
        ("GPU-a\\nGPU-b\\nGPU-c\\n", None, ["GPU-a", "GPU-b", "GPU-c"]),  # then they are shared
        ("GPU-a\\n", "0, GPU-c", ["0", "GPU-c"]),  # whoever names them knows better
        ("", "", []),
    ],
)
def test_the_gpus_that_are_free(smi, monkeypatch, busy, named, expected):
    smi(busy)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert free_gpus() == expected


def test_a_machine_without_gpus_has_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", "")
    assert free_gpus() == []
    assert least_busy([], []) is None


@pytest.mark.parametrize(("devices", "jobs"), [(["0"], 1), (["0", "1", "2"], 2), (["0", "1", "2"], 3), (["0", "5"], 4)])
def test_runs_are_spread_over_the_devices(plan, monkeypatch, devices, jobs):
    """None has two runs more than another, and with no more jobs than devices none is shared."""
    monkeypatch.setattr(execution, "free_gpus", lambda: devices)
    launcher, seen = Launcher(), []

    def start(run, environment):
        process = launcher(run, environment)
        given = zip(launcher.environments, launcher.processes, strict=True)
        seen.append(Counter(own["CUDA_VISIBLE_DEVICES"] for own, one in given if one.returncode is None))
        return process

    compare(plan, jobs=jobs, start=start)
    assert len(seen) == 9
    assert {device for counts in seen for device in counts} <= set(devices)
    assert max(max(counts.values()) for counts in seen) == -(-jobs // len(devices))


def test_without_devices_the_environment_is_left_alone(plan, monkeypatch):
    monkeypatch.setattr(execution, "free_gpus", lambda: [])
    launcher = Launcher()
    compare(plan, start=launcher)
    assert all("CUDA_VISIBLE_DEVICES" not in environment for environment in launcher.environments)


def test_two_comparisons_in_one_folder_divide_the_runs(plan):
    """As on two machines: each run is trained once, and both report all of them."""
    both = threading.Barrier(2, timeout=60)
    launchers, results = [Launcher(), Launcher()], {}

    def work(number):
        def start(run, environment):
            if not launchers[number].started:
                both.wait()  # so that neither has done all before the other begins
            return launchers[number](run, environment)

        results[number] = compare(plan, start=start).to_dict()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    folders = [run.folder for launcher in launchers for run in launcher.started]
    assert len(folders) == len(set(folders)) == 9
    assert results[0] == results[1]


def test_a_run_that_a_killed_comparison_left_behind_is_waited_for(plan):
    """The run's process holds the lock of its folder, although nobody holds the claim."""
    orphan = make_runs(plan)[0].folder
    orphan.mkdir(parents=True)
    lock = FileLock(orphan / LOCK)
    lock.acquire()
    launcher = Launcher()

    def start(run, environment):
        if len(launcher.started) == 7:
            assert claim(orphan) is None
            lock.release()
        return launcher(run, environment)

    compare(plan, start=start)
    assert [run.folder for run in launcher.started].index(orphan) >= 7
    assert len(launcher.started) == 9


def test_a_run_that_found_its_folder_taken_is_done_later(plan, monkeypatch):
    """The run of a comparison that was killed just then locks the folder between our claim and our run's start."""
    taken = make_runs(plan)[0].folder
    lock = FileLock(taken / LOCK)
    launcher = Launcher(lambda config: (2 if lock.is_locked else 0, "loraloom: another run works there now\n", {}))

    def start(run, environment):
        if not launcher.started:
            lock.acquire()
        return launcher(run, environment)

    in_use = execution.in_use

    def look(folder):
        found = in_use(folder)
        lock.release()
        return found

    monkeypatch.setattr(execution, "in_use", look)
    comparison = compare(plan, start=start)
    assert len(launcher.started) == 10
    assert sum(run.folder == taken for run in launcher.started) == 2
    assert not any(outcome.error for outcome in comparison.outcomes)


def test_claims_end_with_the_runs(plan):
    compare(plan, start=Launcher())
    for run in make_runs(plan):
        with FileLock(run.folder / CLAIM, timeout=0):
            pass


def make_runs(plan):
    rate = plan.entries[0].learning_rates[0]
    return [make_run(plan, entry, {LEARNING_RATE: rate}, seed) for seed in plan.seeds for entry in plan.entries]
