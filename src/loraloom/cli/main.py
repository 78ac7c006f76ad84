"""`loraloom VERB ...`. A verb's file is imported when the verb is called: `loraloom --help` loads no torch.

Exit codes: 0 done; 1 the run failed, or an unexpected error; 2 wrong input; 130 interrupted.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from loraloom import __version__
from loraloom.errors import InputError, RunFailedError, RunInterruptedError
from loraloom.text import did_you_mean, printable

VERBS = {
    "quickstart": "fine-tune a real model on real text in a few minutes, without the hub",
    "train": "fine-tune a model as RUN.yaml says",
    "compose": "make one adapter of trained ones, with weights learned from a few examples",
    "compare": "train several methods side by side, with several seeds and learning rates",
    "predict": "ask a finished run: labels with probabilities, or text as it is written",
    "evaluate": "load a finished run from its folder and evaluate it again",
    "init": "write a commented RUN.yaml to start from",
    "recipes": "list the experiments of the papers as RUN.yaml, or copy one",
    "ranks": "choose target modules and ranks before training, by the gradients of a few batches",
    "inspect": "say what is in an adapter, what is wrong with it, and which server takes it",
    "intruders": "find the directions of an adapter that are new to its base, and scale them down",
    "combine": "make one plain LoRA of several adapters without training: sums, TIES, DARE, core space",
    "shrink": "write an adapter with smaller ranks, chosen by what they lose",
    "extract": "write the LoRA that is nearest to the difference of two checkpoints",
    "export": "write an adapter as a plain LoRA that PEFT, vLLM, SGLang or llama.cpp loads",
    "merge": "merge adapters into a base model on disk, in little memory, and verify the result",
}
HELP = f"""usage: loraloom VERB [options]

Low-rank fine-tuning methods that PEFT lacks, combined in one fast layer.

verbs:
{chr(10).join(f"  {verb:<12}{summary}" for verb, summary in VERBS.items())}

options:
  --help      this text; after a verb, the verb's options
  --version   the version
  --debug     after a verb: errors with their traceback

exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted"""


# Of an OSError: what another path or a free disk mends.
_THE_USERS = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. A wrong input is one line on stderr, with a traceback only on `--debug`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = arguments
    debug = "--debug" in rest
    try:
        if verb not in VERBS:
            raise InputError(
                f"unknown verb {verb!r}{did_you_mean(verb, VERBS)} See loraloom --help", code="unknown-verb"
            )
        importlib.import_module(f"loraloom.cli.{verb}").main([word for word in rest if word != "--debug"])
    except InputError as error:
        return _report(str(error), 2, debug)
    except RunInterruptedError as error:
        return _report(str(error), 130, debug)
    except KeyboardInterrupt:
        return _report("interrupted; nothing new was saved", 130, debug)
    except RunFailedError as error:
        return _report(str(error), 1, debug)
    except OSError as error:
        if error.errno not in _THE_USERS:
            return _report(f"{error} (run again with --debug for the traceback)", 1, debug)
        return _report(f"{error.filename or 'the output'}: {error.strerror}", 2, debug)
    except Exception as error:
        message = " ".join(str(error).split())[:500]
        return _report(f"{type(error).__name__}: {message} (run again with --debug for the traceback)", 1, debug)
    return 0


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # Of several processes of one run, all meet the same wrong input: the first one says it.
    if code != 2 or os.environ.get("RANK", "0") == "0":
        print(f"loraloom: {printable(message, lines=False)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
