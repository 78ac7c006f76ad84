"""Help of a verb with many keys: the verb's own options first, a section of RUN.yaml when it is asked for."""

import contextlib
import io
import re
from collections.abc import Callable, Sequence

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import TRAINING_DEFAULTS, TRAINING_KEYS
from loraloom.training.metrics import DEFAULTS, METRICS

_PANEL = re.compile(r"╭─ (\w+) options ─.*?╰─*╯\n", re.DOTALL)


def sectioned_help(verb: str, sections: Sequence[str], words: Sequence[str], show: Callable[[], None]) -> str | None:
    """The text for `--help`, `--help SECTION` or `--help-all`; None where no help is asked for.

    Args:
        verb: its name.
        sections: the sections that it has, without `training`.
        words: the words after the verb.
        show: prints all of the help and exits, as tyro does.

    Raises:
        InputError: another section.
    """
    asked = [i for i, word in enumerate(words) if word in ("--help", "-h", "--help-all")]
    if not asked:
        return None
    # With an encoding: tyro draws the panels that are taken apart here only where they can be printed.
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        show()
    everything = printed.buffer.getvalue().decode()
    if words[asked[0]] == "--help-all":
        return everything + training_help()
    known = [*sections, "training"]
    chosen = words[asked[0] + 1] if asked[0] + 1 < len(words) else None
    if chosen is None:
        own = _PANEL.sub(lambda panel: "" if panel[1] in sections else panel[0], everything)
        listed = "\n".join(f"  loraloom {verb} --help {name}" for name in known)
        return f"{own}\nThe keys of each section of RUN.yaml, or all of them with --help-all:\n{listed}\n"
    if chosen not in known:
        raise InputError(
            f"--help {chosen}: expected a section of {', '.join(known)}{did_you_mean(chosen, known)}", code="no-section"
        )
    if chosen == "training":
        return training_help()
    return next(panel[0] for panel in _PANEL.finditer(everything) if panel[1] == chosen)


def training_help() -> str:
    """What the section `training` has beside the keys of transformers and TRL."""
    lines = [
        "training: any key of TrainingArguments; causal-lm: of TRL's SFTConfig; preference: of its DPOConfig;",
        "seq2seq-lm: of Seq2SeqTrainingArguments. Defaults that differ from theirs:",
        *(f"  --training.{key} {value}" for key, value in TRAINING_DEFAULTS.items()),
        "",
        "and loraloom's own:",
        *(f"  --training.{key}: {text}" for key, text in TRAINING_KEYS.items()),
        "",
        "metrics by task, the defaults first:",
    ]
    for task, defaults in DEFAULTS.items():
        others = [name for name, metric in METRICS.items() if task in metric.tasks and name not in defaults]
        lines.append(f"  {task}: {', '.join(defaults)}" + (f"; {', '.join(others)}" if others else ""))
    return "\n".join(lines) + "\n"
