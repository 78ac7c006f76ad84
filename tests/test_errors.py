"""Errors carry a code, in every process."""

import pickle

import pytest

from loraloom.errors import InputError, RunFailedError, RunInterruptedError


@pytest.mark.parametrize("kind", [InputError, RunFailedError, RunInterruptedError])
def test_an_error_goes_to_another_process_with_its_code(kind):
    sent = pickle.loads(pickle.dumps(kind("r is 0", code="rank")))
    assert type(sent) is kind
    assert (str(sent), sent.code) == ("r is 0", "rank")


def test_no_error_without_a_code():
    with pytest.raises(TypeError):
        InputError("r is 0")
