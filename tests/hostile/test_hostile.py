"""No file hangs a verb, fills the memory, reaches the terminal, or gets an answer other than one line.

`make test` runs a sample, `make test-all` all of it; `python -m tests.hostile` shows numbers and the slowest case.
"""

import pytest

from tests.hostile.case import Case
from tests.hostile.corpus import corpus, sample
from tests.hostile.originals import make_originals, make_run
from tests.hostile.rule import Bench, how_broken

PER_FAMILY = 8  # cases of `make test`, one verb each


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "originals").mkdir()
    make_originals(folder / "originals")
    make_run(folder / "originals")
    with Bench(folder) as made:
        yield made


def failures(outcomes):
    return [(o.verb, str(o.case), o.failure, o.line) for o in outcomes if o.failure]


def test_a_sample_of_every_family(bench):
    assert not failures(bench.outcomes(sample(corpus(bench.originals), PER_FAMILY), every_verb=False))


@pytest.mark.slow
def test_every_case_with_every_verb(bench):
    assert not failures(bench.outcomes(corpus(bench.originals)))


@pytest.mark.parametrize("of", ["lora", "loom", "composition", "base", "sharded", "run"])
def test_the_verbs_take_the_sound_files(bench, of):
    """So that what they refuse is what a case changed."""
    outcomes = [*bench.outcomes([Case("sound", "as it is", of, lambda folder: None)])]
    assert not failures(outcomes)
    assert {outcome.verb: outcome.code for outcome in outcomes} == {outcome.verb: 0 for outcome in outcomes}


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("pass", None),
        ("raise InputError('one line', code='x')", None),
        ("raise KeyError('x')", "an unexpected error"),
        ("import sys; print('more', file=sys.stderr); raise InputError('x', code='x')", "2 lines of error"),
        ("bytearray(2**30)", "an unexpected error"),
        ("print('\\x1b[2J')", "control characters ['\\x1b']"),
        ("print('Traceback')", "a traceback"),
        ("os.kill(os.getpid(), 9)", "exit -9"),
        ("exit(3)", "exit 3"),
        ("open('here', 'w')", "wrote"),
        ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass", "more than 10 s"),
    ],
)
def test_the_rule_sees_what_breaks_it(bench, code, failure):
    case = Case("rule", code, "lora", lambda folder: None)
    bench.make(case)
    found = bench.outcome(case, ["hostile_python", code]).failure
    assert found == failure or (failure == "wrote" and found.startswith("wrote"))


def test_numbers_that_json_does_not_have_are_seen():
    answer = {"code": 0, "blocked": False, "err": "", "out": '{"norm": NaN}'}
    assert how_broken(answer, as_json=True) == "no JSON"
    assert how_broken(answer | {"out": '{"norm": null}'}, as_json=True) is None
