"""Runs shared out: one comparison trains each, on one of the GPUs that are free.

A comparison holds a lock in the folder of each run that it trains, and the run itself holds its own: so several
comparisons, on this machine or on others that see the folder, divide the runs among themselves.
"""

import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import filelock

from loraloom.training.folder import LOCK

CLAIM = ".claim"


def claim(folder: Path) -> filelock.BaseFileLock | None:
    """A lock on a run's folder, to be held while it trains.

    None where another comparison trains it, or a run that a killed one left behind works there still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / CLAIM, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    if in_use(folder):
        lock.release()
        return None
    return lock


def in_use(folder: Path) -> bool:
    """Whether a run works in the folder now."""
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True


def free_gpus() -> list[str]:
    """The GPUs to use, as `CUDA_VISIBLE_DEVICES` names them: those that it lists, else those without a process.

    By UUID: nvidia-smi counts them by their places on the bus, CUDA by their speeds.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    every = [row[0] for row in _nvidia_smi("--query-gpu=uuid")]
    busy = {row[0] for row in _nvidia_smi("--query-compute-apps=gpu_uuid")}
    return [uuid for uuid in every if uuid not in busy] or every


def least_busy(devices: Sequence[str], taken: Iterable[str | None]) -> str | None:
    """The device with the fewest runs on it, the first of several; None without devices."""
    runs = Counter(taken)
    return min(devices, key=lambda device: runs[device], default=None)


def _nvidia_smi(query: str) -> list[list[str]]:
    """The answer's rows; none where the tool, or a GPU, is missing. Asking torch would load it."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
