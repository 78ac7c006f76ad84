"""The errors that a user can act on; each is one line that names the value, what was expected, and the fix."""

from functools import partial
from typing import Any


class LoraloomError(Exception):
    """An error with a code, which stays when its sentence gets better: for programs and tests to match.

    Attributes:
        code: kebab-case, one per cause: "unknown-key", "not-finite", ...
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that send an error to each other: the code goes with it."""
        return partial(type(self), code=self.code), self.args


class InputError(LoraloomError, ValueError):
    """A wrong file, key, value or column. The command line prints it as one line and exits with 2."""


class RunFailedError(LoraloomError, RuntimeError):
    """The input was right, and the run failed all the same. The command line prints one line and exits with 1."""


class RunInterruptedError(LoraloomError, RuntimeError):
    """The user stopped the run and a checkpoint was saved. The command line prints one line and exits with 130."""
