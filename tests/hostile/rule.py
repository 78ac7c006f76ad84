"""The rule: within 10 s of CPU exit 0, 1 or 2, at most one line of error, no traceback, no control characters.

No memory beyond the files' size and 256 MiB, and nothing written but a complete result.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.case import Case
from tests.hostile.verbs import command_lines

SECRET = "what is outside of the folder"


@dataclass(frozen=True)
class Outcome:
    """What a verb made of a case; `failure` is how that broke the rule, or None."""

    case: Case
    verb: str
    code: int
    seconds: float
    failure: str | None
    line: str
    """The last line of stderr."""


class Bench:
    """A worker and its folders.

    Args:
        folder: with `originals` in it; cases are made and removed beside them.
        environment: what the worker has besides: PYTHONPATH for another version of the code.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder, self.originals = folder, folder / "originals"
        for name in ("home", "tmp", "cwd"):
            (folder / name).mkdir(exist_ok=True)
        self._case, self._out = folder / "case", folder / "written" / "out"
        own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.worker", str(self.originals)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own | (environment or {}),
        )
        self.verbs: list[str] = json.loads(self._read())

    def close(self) -> None:
        self._worker.communicate()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def outcomes(self, cases: Iterable[Case], every_verb: bool = True) -> Iterator[Outcome]:
        """Every verb on each of the cases, or one of them in turn."""
        for turn, case in enumerate(cases):
            self.make(case)
            lines = [
                line
                for line in command_lines(case, self._case / "it", self.originals, self._out, turn)
                if line[0] in self.verbs
            ]
            for line in lines if every_verb else [lines[turn % len(lines)]]:
                yield self.outcome(case, line)

    def outcome(self, case: Case, line: list[str]) -> Outcome:
        """One command line on a case that was made."""
        shutil.rmtree(self._out.parent, ignore_errors=True)
        self._out.parent.mkdir()
        before = self._state()
        size = sum(file.lstat().st_size for file in self._case.rglob("*"))
        request = {"arguments": line, "cwd": str(self.folder / "cwd"), "bytes": size}
        assert self._worker.stdin is not None
        print(json.dumps(request), file=self._worker.stdin, flush=True)
        answer = json.loads(self._read())
        failure = how_broken(answer, "--json" in line) or self._written(before, answer["code"])
        last = answer["err"].strip().rpartition("\n")[2]
        return Outcome(case, line[0], answer["code"], answer["seconds"], failure, last[:300])

    def _read(self) -> str:
        assert self._worker.stdout is not None
        if line := self._worker.stdout.readline():
            return line
        raise RuntimeError("the worker of the hostile suite has died")

    def make(self, case: Case) -> None:
        """Makes a case's folder in the place of the last one's."""
        shutil.rmtree(self._case, ignore_errors=True)
        self._case.mkdir()
        (self._case / "secret.txt").write_text(SECRET)
        shutil.copytree(self.originals / case.of, self._case / "it")
        case.build(self._case / "it")

    def _state(self) -> dict[str, tuple[int, int, int]]:
        """What lies around; the locks in the temporary folder do not count."""
        found = {}
        for root in (self._case, self.originals, *(self.folder / name for name in ("cwd", "home", "tmp"))):
            for folder, folders, files in os.walk(root):
                for name in (*folders, *files):
                    if not (name.startswith("loraloom-") and name.endswith(".lock")):
                        path = os.path.join(folder, name)
                        stat = os.lstat(path)
                        found[path] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
        return found

    def _written(self, before: dict[str, Any], code: int) -> str | None:
        after = self._state()
        changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
        if changed:
            return f"wrote {sorted(changed)[0]!a}"
        left = [path.name for path in self._out.parent.iterdir() if code or path != self._out]
        if left:
            return f"left {left[0]!a} beside or at --out"
        if any(file.is_symlink() or SECRET.encode() in file.read_bytes() for file in _files(self._out)):
            return "copied what a link names"
        return None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]


def how_broken(answer: dict[str, Any], as_json: bool = False) -> str | None:
    """How what a verb did and printed breaks the rule, or None."""
    code, out, err = answer["code"], answer["out"], answer["err"]
    if answer["blocked"]:
        return "blocked"
    if code == -24:
        return "more than 10 s"
    if code not in (0, 1, 2):
        return f"exit {code}"
    if "Traceback" in out + err:
        return "a traceback"
    if "run again with --debug" in err:
        return "an unexpected error"
    if strange := {c for c in out + err if not (c.isprintable() or c == "\n")}:
        return f"control characters {sorted(strange)!a}"
    lines = err.splitlines()
    if code and not (lines and lines[-1].startswith("loraloom: ")):
        return "no line of error at the end"
    if len(lines) != (code > 0) and not as_json:  # with --json, what is shown goes to stderr as well
        return f"{len(lines)} lines of error"
    if as_json and out:
        try:
            json.loads(out, parse_constant=_refuse)
        except ValueError:
            return "no JSON"
    return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)
