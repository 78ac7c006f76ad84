"""`--nproc N`: the same command in N processes that train together, with the exit code of the first that fails."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from loraloom.errors import InputError

POLL_SECONDS = 0.2
GRACE_SECONDS = 30  # for the others to end after one has failed, or to save a checkpoint after Ctrl-C


def launch(verb: str, arguments: Sequence[str], processes: int) -> None:
    """Run the verb in `processes` processes on this machine, as torchrun does, and end with their exit code.

    Ctrl-C reaches all of them through the terminal: they save a checkpoint and end.

    Raises:
        InputError: not a number of processes, or this is one of several already.
        SystemExit: a process failed; with its code.
    """
    if processes < 1:
        raise InputError(f"--nproc {processes}: expected 1 or more", code="nproc")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--nproc within torchrun would start processes twice: use one of them", code="nproc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    command = [sys.executable, "-m", "loraloom.cli.main", verb, *arguments]
    children = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        code = _wait(children)
    except KeyboardInterrupt:
        code = _end(children, ask=False) or 130
    finally:
        _end(children)
    if code:
        sys.exit(code)


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """The code of the first process that fails, or 0 when all are done."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 1  # killed by a signal
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _end(children: Sequence[subprocess.Popen], ask: bool = True) -> int:
    """End what still runs, asked first, then killed; returns the largest code."""
    for child in children:
        if ask and child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    return max((child.returncode for child in children), default=0)
