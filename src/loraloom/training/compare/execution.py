"""Many runs, some at a time: skips what is finished, waits for what others train, outlives failures, stops cleanly."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from loraloom.errors import RunInterruptedError
from loraloom.training.compare import runs
from loraloom.training.compare.runs import Run, failure, finished
from loraloom.training.compare.sharing import claim, free_gpus, in_use, least_busy

POLL_SECONDS = 0.1
ELSEWHERE_SECONDS = 2  # between two looks at the runs that other comparisons train
GRACE_SECONDS = 10  # between asking a process to stop and killing it
WRONG_INPUT = 2  # exit code of `loraloom train`


class Process(Protocol):
    """What is needed of subprocess.Popen."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Launch = Callable[[Run, Mapping[str, str]], Process]


@dataclass(frozen=True)
class Outcome:
    """A run with the content of its metrics.json, or with the reason why there is none."""

    run: Run
    result: Mapping[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Active:
    """A run that trains."""

    run: Run
    process: Process
    started: float
    device: str | None
    claim: filelock.BaseFileLock


class Executor:
    """Trains runs in processes of their own, `jobs` at a time, each on the GPU that has fewest of them.

    A run that another comparison trains, here or on another machine, is waited for.

    Args:
        jobs: processes at a time.
        total: runs that the progress bar counts to.
        console: gets a line for each run, and on a terminal a bar.
        launch: starts a run; tests give their own.
        devices: what to give a run one of, as `CUDA_VISIBLE_DEVICES`. Default: the GPUs that are free.
    """

    def __init__(
        self,
        jobs: int,
        total: int,
        console: Console,
        launch: Launch = runs.launch,
        devices: Sequence[str] | None = None,
    ):
        self.jobs = jobs
        self.launch = launch
        self.console = console
        self.outcomes: dict[Path, Outcome] = {}
        self.wrong_input: dict[str, str] = {}
        self.active: dict[Path, Active] = {}
        self.devices = free_gpus() if devices is None else devices
        self.next_look = 0.0
        self.skipped = 0
        self.total = total
        running = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), running)
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar = self.progress.add_task("", total=total)
        # All cores to each of several processes makes every one of them slower than its share would.
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))} if jobs > 1 else {}

    def run(self, wanted: Sequence[Run]) -> list[Outcome]:
        """Train what is not finished, and give the outcomes in the order of `wanted`.

        Raises:
            RunInterruptedError: Ctrl-C, or SIGTERM; the processes are stopped.
        """
        waiting = [run for folder, run in {run.folder: run for run in wanted}.items() if folder not in self.outcomes]
        waiting = [run for run in waiting if not self._is_finished(run)]
        try:
            with _sigterm_as_interrupt(), self.progress:
                while waiting or self.active:
                    self._fill(waiting)
                    waiting += self._collect()
                    if waiting or self.active:
                        time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            done = sum(outcome.result is not None for outcome in self.outcomes.values())
            raise RunInterruptedError(
                f"stopped with {done} of {self.total} runs finished", code="interrupted"
            ) from None
        finally:
            self._stop()
        outcomes = [self.outcomes[run.folder] for run in wanted]
        return [dataclasses.replace(outcome, run=run) for outcome, run in zip(outcomes, wanted, strict=True)]

    def _is_finished(self, run: Run) -> bool:
        """Whether the run needs no training; then it is recorded."""
        if (result := finished(run)) is None:
            return False
        self.skipped += 1
        self._record(Outcome(run, result))
        return True

    def _fill(self, waiting: list[Run]) -> None:
        """Start as many of the waiting runs as there is room for; those that are trained elsewhere stay."""
        if len(self.active) == self.jobs or time.monotonic() < self.next_look:
            return
        for run in [*waiting]:
            if len(self.active) == self.jobs:
                return
            if run.wrong_with in self.wrong_input:
                self._record(Outcome(run, None, f"not started: {self.wrong_input[run.wrong_with]}"))
            elif (lock := claim(run.folder)) is None:
                continue
            elif self._is_finished(run):  # elsewhere, meanwhile
                lock.release()
            else:
                self._start(run, lock)
            waiting.remove(run)
        if waiting:
            self.next_look = time.monotonic() + ELSEWHERE_SECONDS

    def _start(self, run: Run, lock: filelock.BaseFileLock) -> None:
        device = least_busy(self.devices, [active.device for active in self.active.values()])
        environment = self.environment | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        try:
            process = self.launch(run, environment)
        except BaseException:
            lock.release()
            raise
        self.active[run.folder] = Active(run, process, time.monotonic(), device, lock)
        self._describe()

    def _collect(self) -> list[Run]:
        """Record the runs that have ended; returns those that could not start, as another had just begun them."""
        again = []
        for folder, active in list(self.active.items()):
            code = active.process.poll()
            if code is None:
                continue
            del self.active[folder]
            run = active.run
            result = finished(run)  # whatever the code: a run that was left behind may have ended meanwhile
            taken = result is None and code == WRONG_INPUT and in_use(folder)
            active.claim.release()
            if taken:
                again.append(run)
                continue
            error = None if result is not None else failure(run, code)
            if error is not None and code == WRONG_INPUT:
                self.wrong_input[run.wrong_with] = error
            self._record(Outcome(run, result, error), time.monotonic() - active.started)
            self._describe()
        return again

    def _record(self, outcome: Outcome, seconds: float | None = None) -> None:
        self.outcomes[outcome.run.folder] = outcome
        self.progress.advance(self.bar)
        if seconds is None and outcome.result is not None:
            return  # finished earlier
        took = "" if seconds is None else f" ({seconds:.0f} s)"
        what = f"failed: {outcome.error}" if outcome.error else "done"
        self.console.print(
            f"[{len(self.outcomes)}/{self.total}] {outcome.run.title}: {what}{took}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _describe(self) -> None:
        titles = "; ".join(active.run.title for active in self.active.values())
        self.progress.update(self.bar, description=titles)

    def _stop(self) -> None:
        """End the processes that still run: asked first, then killed."""
        stopped = [*self.active.values()]
        processes = [active.process for active in stopped]
        self.active.clear()
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:  # also on a second Ctrl-C
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for active in stopped:
                active.claim.release()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """`kill PID` stops the runs as Ctrl-C does, instead of leaving them behind; only the main thread can ask for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
