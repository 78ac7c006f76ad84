"""The runs of a comparison: what identifies one, whether it is finished, and training it in a process of its own.

A run's folder is named by its method, rate, seed and a hash of its whole configuration and of its data files, so a
changed COMPARE.yaml finds the runs that it shares with the old one. A run is finished if and only if its folder holds
metrics.json, which training writes last, beside a resolved.yaml that is the run's configuration.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraloom.errors import InputError
from loraloom.io.files import write_text_atomically
from loraloom.training.compare.config import LEARNING_RATE, Entry, Plan, Point, configure
from loraloom.training.config import OutputSection, RunConfig
from loraloom.training.folder import RESOLVED, RESULT
from loraloom.training.load import dump_config, load_config

RUN_FILE, LOG = "run.yaml", "log.txt"


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    label: str
    point: Point
    seed: int
    config: RunConfig = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where it trains; two runs of the same configuration share it."""
        return Path(self.config.output.dir)

    @property
    def title(self) -> str:
        """How the run is called on the terminal."""
        return f"{self.label}, {describe(self.point)}, seed {self.seed}"

    @property
    def wrong_with(self) -> str:
        """Equal for runs that differ in nothing but rate and seed: what is wrong input to one is to all of them."""
        return f"{self.label} {point_key({**self.point, LEARNING_RATE: None})}"


def point_key(point: Point) -> str:
    """Equal for equal points."""
    return json.dumps(point, sort_keys=True)


def describe(point: Point) -> str:
    """`learning rate 0.001, method.r 8`."""
    names = {LEARNING_RATE: "learning rate"}
    return ", ".join(f"{names.get(key, key)} {format_value(value)}" for key, value in point.items())


def format_value(value: Any) -> str:
    """A float in a few digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def make_run(plan: Plan, entry: Entry, point: Point, seed: int) -> Run:
    """The run of a method at a point with a seed, and its folder.

    Raises:
        InputError: the point makes the configuration wrong.
    """
    config = configure(entry, point, seed)
    identity = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    identity["files"] = [_sha256(Path(value)) for value in _files(config)]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    name = f"{config.method.name}-lr{config.training['learning_rate']:.3g}-seed{seed}-{digest[:12]}"
    # A folder with a resolved.yaml and no metrics.json is that of a killed run: it is replaced.
    output = OutputSection(dir=str(plan.folder / "runs" / name), overwrite=True)
    return Run(entry.label, point, seed, dataclasses.replace(config, output=output))


def finished(run: Run) -> dict[str, Any] | None:
    """What metrics.json of a finished run holds; None if the run is not finished."""
    try:
        result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
        resolved = load_config(run.folder / RESOLVED)
        if dataclasses.replace(resolved, output=run.config.output) == run.config:  # the folder may have been moved
            return result
    except (OSError, ValueError):  # missing or broken files (InputError is a ValueError): the run is done again
        pass
    return None


def launch(run: Run, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start training in a process of its own; what it prints goes to log.txt in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / RESULT).unlink(missing_ok=True)
    write_text_atomically(run.folder / RUN_FILE, dump_config(run.config))
    command = [sys.executable, "-m", "loraloom.cli.main", "train", str(run.folder / RUN_FILE)]
    with (run.folder / LOG).open("wb") as log:
        environment = {**os.environ, **environment}
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def failure(run: Run, code: int) -> str:
    """Why a run that ended with `code` has no result, in one line."""
    if code < 0:
        return f"killed by signal {-code}{' (out of memory?)' if code == -9 else ''}; see {run.folder / LOG}"
    try:
        lines = (run.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    last = next((line for line in reversed(lines) if line.startswith("loraloom: ")), lines[-1] if lines else "")
    return f"{last.removeprefix('loraloom: ') or f'exit code {code}'}; see {run.folder / LOG}"


def _files(config: RunConfig) -> list[str]:
    """The data section's local files: their content is part of what a run is."""
    values = [*dataclasses.asdict(config.data).values(), *config.data.mix]
    return [value for value in values if isinstance(value, str) and Path(value).is_file()]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", code="unreadable") from None
