"""The errors that a user can act on; each is one line that names the value, what was expected, and the fix."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong file, key, value or column. The command line prints it as one line and exits with 2."""


class RunFailedError(RuntimeError):
    """The input was right and the run still came to nothing. The command line prints one line and exits with 1."""


class RunInterruptedError(RuntimeError):
    """The user stopped the run and a checkpoint was saved. The command line prints one line and exits with 130."""


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` for the candidate nearest to `name`, or nothing when none has a similarity of `cutoff`."""
    nearest = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
