"""Many runs, some at a time: skips what is finished, outlives failures, stops its processes when it is stopped."""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from loraloom.errors import InputError, RunInterruptedError
from loraloom.training.compare import runs
from loraloom.training.compare.runs import Run, failure, finished

POLL_SECONDS = 0.1
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


class Executor:
    """Trains runs in processes of their own, `jobs` at a time.

    Args:
        jobs: processes at a time.
        total: runs that the progress bar counts to.
        console: gets a line for each run, and on a terminal a bar.
        launch: starts a run; tests give their own.
    """

    def __init__(self, jobs: int, total: int, console: Console, launch: Launch = runs.launch):
        self.jobs = jobs
        self.launch = launch
        self.console = console
        self.outcomes: dict[Path, Outcome] = {}
        self.wrong_input: dict[str, str] = {}
        self.active: dict[Path, tuple[Run, Process, float]] = {}
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
        waiting = []
        for run in {run.folder: run for run in wanted}.values():
            if run.folder in self.outcomes:
                continue
            if (result := finished(run)) is not None:
                self.skipped += 1
                self._record(Outcome(run, result))
            else:
                waiting.append(run)
        try:
            with _sigterm_as_interrupt(), self.progress:
                while waiting or self.active:
                    while waiting and len(self.active) < self.jobs:
                        self._start(waiting.pop(0))
                    self._collect()
                    if self.active:
                        time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            done = sum(outcome.result is not None for outcome in self.outcomes.values())
            raise RunInterruptedError(f"stopped with {done} of {self.total} runs finished") from None
        finally:
            self._stop()
        outcomes = [self.outcomes[run.folder] for run in wanted]
        return [dataclasses.replace(outcome, run=run) for outcome, run in zip(outcomes, wanted, strict=True)]

    def _start(self, run: Run) -> None:
        if run.wrong_with in self.wrong_input:
            self._record(Outcome(run, None, f"not started: {self.wrong_input[run.wrong_with]}"))
            return
        self.active[run.folder] = (run, self.launch(run, self.environment), time.monotonic())
        self._describe()

    def _collect(self) -> None:
        for folder, (run, process, started) in list(self.active.items()):
            code = process.poll()
            if code is None:
                continue
            del self.active[folder]
            result = finished(run) if code == 0 else None
            error = None if result is not None else failure(run, code)
            if error is not None and code == WRONG_INPUT:
                self.wrong_input[run.wrong_with] = error
            self._record(Outcome(run, result, error), time.monotonic() - started)
            self._describe()

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
        titles = "; ".join(run.title for run, _, _ in self.active.values())
        self.progress.update(self.bar, description=titles)

    def _stop(self) -> None:
        """End the processes that still run: asked first, then killed."""
        processes = [process for _, process, _ in self.active.values()]
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a comparison's folder, so that two of them do not train the same run at a time.

    The processes inherit the lock: after a comparison was killed, its last runs keep the folder until they end.

    Raises:
        InputError: another comparison, or a run that it left behind, works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"output.dir {str(folder)!r}: another comparison, or a run of one, works there") from None
        os.set_inheritable(file.fileno(), True)
        yield
