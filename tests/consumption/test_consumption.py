"""Every kind of adapter (kinds.py) through every verb (consumers.py): exact, or refused in one line.

One float64 reference per adapter (references.py). A cell that is known to fail stands in `KNOWN_FAILURES`, with the
line of the audit that it belongs to; a cell that is mended must leave it.
"""

import re

import pytest
import torch

from tests.consumption.consumers import CONSUMERS
from tests.consumption.kinds import ALL_KINDS, BROKEN, KINDS, Part, Refused
from tests.consumption.known_failures import KNOWN_FAILURES
from tests.consumption.references import load_base, logits

CELLS = [(kind.name, verb) for kind in ALL_KINDS.values() for verb in kind.verbs]


def _cell(kind: str, verb: str):
    reason = KNOWN_FAILURES.get((kind, verb))
    marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
    return pytest.param(kind, verb, marks=marks, id=f"{kind}-{verb}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "verb"), [_cell(*cell) for cell in CELLS])
def test_cell(kind, verb, case_of, tmp_path):
    case = case_of(kind, tmp_path / "out")
    expected = case.kind.expected(verb)
    if not isinstance(expected, Refused):
        outcome = CONSUMERS[verb](case)
        if isinstance(expected, Part):
            assert isinstance(outcome, Part)
            assert re.search(expected.word, outcome.word, re.IGNORECASE)
        else:
            assert outcome == expected
        return
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (InputError is one; the message is looked at)
        CONSUMERS[verb](case)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(expected.word, message, re.IGNORECASE), message
    if case.kind.code:
        assert getattr(caught.value, "code", "") == case.kind.code, message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind.name for kind in KINDS if kind.per_weight and not kind.disk_only])
def test_the_reference_is_what_peft_computes_and_no_adapter_is_idle(kind, case_of, tmp_path):
    """Writing W' into the base by hand gives PEFT's logits; the adapter changes them; intruders are there to find."""
    case = case_of(kind, tmp_path)
    reference = case.truth
    torch.testing.assert_close(reference.logits_written_out, reference.logits, rtol=1e-6, atol=1e-6)
    before = logits(load_base(case.base, torch.float64))
    assert (reference.logits - before).abs().max() > 0.1 * before.abs().max()
    assert sum(len(weight.intruders) for weight in reference.weights.values()) >= 2
    assert (reference.mitigated_logits - reference.logits).abs().max() > 1e-2 * before.abs().max()


def test_the_table_of_known_failures_names_cells():
    assert set(KNOWN_FAILURES) <= set(CELLS)
    assert {kind.name for kind in BROKEN} <= set(ALL_KINDS)
