"""What is done to a hostile folder: the command lines of every verb that reads files, and loading."""

from pathlib import Path

from tests.hostile.case import ADAPTERS, Case

# Verbs of this suite alone, see tests.hostile.worker: `open_adapter`, `PeftModel.from_pretrained`, `loraloom.compose`.
LIBRARY = ("hostile_open", "hostile_load", "hostile_compose")
_TARGETS = ("portable", "peft", "vllm", "sglang", "gguf-ready")
_METHODS = ("linear", "ties", "dare", "core")


def command_lines(case: Case, folder: Path, originals: Path, out: Path, turn: int) -> list[list[str]]:
    """The command lines for a case.

    Args:
        case: what was made of `folder`.
        folder: the hostile folder.
        originals: the sound ones beside it.
        out: where a verb is to write; every verb of the list gets it, and it is removed in between.
        turn: which of several values an option has: targets of export, methods of combine.
    """
    base, lora, tuned = (str(originals / name) for name in ("base", "lora", "tuned"))
    here, to = str(folder), ["--out", str(out)]
    if case.of == "run":
        return [["predict", here, "--text", "the red dog"], ["inspect", here], ["hostile_open", here]]
    if case.of not in ADAPTERS:
        return [
            ["inspect", lora, "--base", here, "--json"],
            ["merge", lora, "--base", here, *to],
            ["intruders", lora, "--base", here, *to],
            ["extract", here, tuned, "--rank", "2", *to],
            ["extract", tuned, here, "--rank", "2", *to],
            ["export", lora, "--to", "sglang", "--base", here, *to],
        ]
    against = ["--base", base]
    return [
        ["inspect", here],
        ["inspect", here, *against, "--json"],
        ["export", here, "--to", _TARGETS[turn % 5], *to],
        ["merge", here, *against, *to],
        ["intruders", here, *against, *(to if turn % 2 else ["--sweep", "0.5,1"])],
        ["combine", here, lora, "--method", _METHODS[turn % 4], *to],
        ["shrink", here, *(("--rank", "2"), ("--energy", "0.9"), ("--parameters", "600"))[turn % 3], *to],
        ["hostile_compose", here, base],
        ["hostile_open", here],
        # Of type LORA, PEFT alone loads it.
        *([] if case.of == "lora" else [["hostile_load", here, base]]),
    ]
