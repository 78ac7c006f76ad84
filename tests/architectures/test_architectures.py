"""Every row of the table beside LoraConfig: ours is no worse, and never silently wrong where LoRA is.

A step is judged by what both libraries give: "ok", "refused" (a message at injection) or "wrong". Where LoRA is ok, so
must we be; where it is refused or wrong, we may refuse, but not be wrong. Where saving or loading by PEFT raises the
same error for both, there is nothing to compare.
"""

from functools import cache

import pytest
from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from loraloom import LoomConfig
from tests.architectures.table import ROWS, WITH_MAGNITUDE
from tests.architectures.walk import OK, ROUTES, walk

COMMON = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
ALL_PARTS = {"use_mixer": "orthogonal", "use_gate": True, "use_dora": True}
# What is asked for: the target modules of a row, and the parts of ours besides.
ASKED = {
    "default targets": (lambda row: None, {}),
    "all-linear": (lambda row: "all-linear", {}),
    "all-linear, all parts": (lambda row: "all-linear", ALL_PARTS),
    "every module": (lambda row: row.every_module(), {}),
    "every module, all parts": (lambda row: row.every_module(WITH_MAGNITUDE), ALL_PARTS),
}
# The rows of `make test`; the others run in `make test-all`.
IN_MAKE_TEST = (
    "bert",
    "roberta",
    "deberta-v2",
    "gpt2",
    "opt",
    "llama",
    "mixtral",
    "jamba",
    "t5",
    "whisper",
    "siglip",
    "wavlm",
    "llava",
)
# What fails today: row -> (the start of what is asked for, the cause). A row that is mended is deleted here.
KNOWN_FAILURES: dict[str, tuple[str | tuple[str, ...], str]] = {}


@cache
def by_lora(name: str, targets: str) -> dict[str, str]:
    row = ROWS[name]
    targets = ASKED[targets][0](row)
    return walk(row, lambda: LoraConfig(task_type=row.task_type, target_modules=targets, **COMMON), "lora_")


@cache
def by_loom(name: str, asked: str) -> dict[str, str]:
    row, (targets_of, parts) = ROWS[name], ASKED[asked]
    targets = targets_of(row)
    return walk(row, lambda: LoomConfig(task_type=row.task_type, target_modules=targets, **COMMON, **parts), "loom_")


def cases():
    for name, row in ROWS.items():
        for asked in ASKED:
            if asked == "default targets" and row.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
                continue  # both ask for target_modules then
            start, cause = KNOWN_FAILURES.get(name, ((), ""))
            marks = [pytest.mark.xfail(reason=cause, strict=True)] if asked.startswith(start) else []
            if name not in IN_MAKE_TEST:
                marks.append(pytest.mark.architectures)
            yield pytest.param(name, asked, marks=marks, id=f"{name}: {asked}")


@pytest.mark.parametrize(("name", "asked"), list(cases()))
def test_a_row_beside_lora(name, asked):
    theirs, ours = by_lora(name, asked.removesuffix(", all parts")), by_loom(name, asked)
    worse = [
        f"{step}: LoRA {theirs[step]}, ours {got}"
        for step, got in ours.items()
        if got != OK
        and (theirs[step] == OK or got.startswith("wrong"))
        and not (step in ROUTES and got == theirs[step])
    ]
    assert not worse, "\n".join(worse)
    assert all("\n" not in got for got in ours.values())
