"""Runs command lines, each in a fork of a process that has everything imported, under limits of memory and time.

A line of JSON on stdin, ``{"arguments": [...], "out": FOLDER, "cwd": FOLDER, "bytes": N}``, is answered by one on
stdout. A fork costs some milliseconds, survives whatever a verb does, and its limits are those of the kernel:
RLIMIT_AS for memory, RLIMIT_CPU for time.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS = 10, 60
ROOM = 256 * 2**20  # bytes beyond the size of the files


def warm_up(originals: Path) -> None:
    """Imports what verbs import when they are called, by calling them on sound files."""
    from loraloom.cli import main as cli

    add_library_verbs(cli.VERBS)
    lora, base, loom = (str(originals / name) for name in ("lora", "base", "loom"))
    out = originals.parent / "warm"
    lines = [["inspect", lora, "--base", base], ["intruders", lora, "--base", base, "--sweep", "0.5"]]
    lines += [
        ["export", loom, "--out", str(out / "export")],
        ["merge", lora, "--base", base, "--out", str(out / "merge")],
    ]
    lines += [
        ["combine", lora, loom, "--out", str(out / "combine")],
        ["shrink", lora, "--rank", "2", "--out", str(out / "s")],
    ]
    lines += [["extract", base, str(originals / "tuned"), "--out", str(out / "extract")]]
    lines += [["hostile_open", loom], ["hostile_load", loom, base], ["hostile_compose", lora, base]]
    if (originals / "run").is_dir():
        lines += [["predict", str(originals / "run"), "--text", "the red dog"]]
    for line in lines:
        if line[0] in cli.VERBS and (code := cli.main(line)):
            raise RuntimeError(f"{line} ended with {code} on sound files")


def add_library_verbs(verbs: dict[str, str]) -> None:
    """Makes verbs of three calls of the library, so that they are judged as the others are."""
    from safetensors import SafetensorError

    from loraloom.errors import InputError

    def wanted(error: Exception) -> bool:
        """What a loader may raise: LoomConfig's own TypeError names the field; PEFT reads the JSON before we do."""
        known = isinstance(error, ValueError | OSError | SafetensorError)
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = any(f"{os.sep}loraloom{os.sep}" in file and f"{os.sep}tests{os.sep}" not in file for file in files)
        return known or not ours or (isinstance(error, TypeError) and str(error).startswith("LoomConfig"))

    def load(folder: str, base: str) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)

    def compose(folder: str, base: str) -> None:
        from transformers import AutoModelForCausalLM

        from loraloom import compose

        compose(AutoModelForCausalLM.from_pretrained(base), {"a": folder}, weights="uniform")

    def open_stored(folder: str) -> None:
        from loraloom.adapter.open import open_adapter

        adapter = open_adapter(folder)
        for module in adapter.modules.values():
            module.factors()

    def python(code: str) -> None:  # for the tests of the rule
        exec(code, {"os": os, "exit": sys.exit, "InputError": InputError})

    functions = {"open": open_stored, "load": load, "compose": compose, "python": python}
    coded: dict[str, Any] = {} if InputError.__init__ is ValueError.__init__ else {"code": "library"}
    if find_spec("loraloom.adapter") is None:  # another version's code: `open_adapter` is not there
        del functions["open"]
    for name, function in functions.items():

        def run(arguments: list[str], function: Any = function) -> None:
            try:
                function(*arguments)
            except Exception as error:
                if function is python or isinstance(error, InputError) or not wanted(error):
                    raise
                raise InputError(" ".join(str(error).split()), **coded) from error

        module = types.ModuleType(f"loraloom.cli.hostile_{name}")
        module.main = run  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        verbs[f"hostile_{name}"] = "a call of the library"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a fork made of a command line: exit code or signal, seconds of CPU, and what it printed."""
    out, err = (open(Path(request["cwd"]) / name, "w+b") for name in (".out", ".err"))  # noqa: SIM115
    began = time.monotonic()
    child = os.fork()
    if not child:
        _be_child(request, out.fileno(), err.fileno())
    status, usage, blocked = _wait(child, began)
    printed = {}
    for name, file in (("out", out), ("err", err)):
        file.seek(0)
        printed[name] = file.read().decode("utf-8", "backslashreplace")
        file.close()
        os.unlink(Path(request["cwd"]) / f".{name}")
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": usage.ru_utime + usage.ru_stime, "blocked": blocked, **printed}


def _wait(child: int, began: float) -> tuple[int, resource.struct_rusage, bool]:
    blocked, pause = False, 0.001
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage, blocked
        if time.monotonic() - began > WALL_SECONDS:
            blocked = True
            os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _be_child(request: dict[str, Any], out: int, err: int) -> None:
    code = 99
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(request["cwd"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM + request["bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        from loraloom.cli.main import main

        code = main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(originals: Path) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warm_up(originals)
    from loraloom.cli.main import VERBS

    print(json.dumps([*VERBS]), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
