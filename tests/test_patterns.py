"""Names and expressions by PEFT's rules: the same answers as PEFT's own functions, and an end in any case."""

import itertools
import time
from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraloom.errors import InputError
from loraloom.patterns import is_target, matches, pattern_value
from tests.hostile.values import BROKEN, HUGE, SLOW

NAMES = ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "model.layers.1.q_projx"]
NAMES += [
    "layers.1.q_proj",
    "model.layers.1.experts.0.q_proj",
    "h.2.q_proj",
    "model.h.2.q_proj",
    "lm_head",
    "a.lm_head.b",
]
OPTIONS = {
    "target_modules": [["q_proj"], ["down_proj", "lm_head"], r".*\.q_proj", r".*[02]\..*", None, []],
    "exclude_modules": [None, ["layers.0.self_attn.q_proj"], r".*mlp.*", []],
    "modules_to_save": [None, ["lm_head"]],
    "layers": [
        (None, None),
        (1, None),
        ([0, 2], None),
        ([0, 2], "h"),
        ([1], ["h", "layers"]),
        ([], None),
        (0, "experts"),
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_pefts(name):
    for target, excluded, saved, (layers, pattern) in itertools.product(*OPTIONS.values()):
        if layers is not None and not isinstance(target, list):
            continue  # LoomConfig refuses the two together
        options = {"target_modules": target, "exclude_modules": excluded, "modules_to_save": saved}
        options |= {"layers_to_transform": layers, "layers_pattern": pattern}
        theirs = check_target_module_exists(SimpleNamespace(**options, target_parameters=["x"]), name)
        expected = None if type(theirs).__name__ == "_ExcludedModule" else bool(theirs)
        assert is_target(name, **options) is expected, options


@pytest.mark.parametrize("name", NAMES)
def test_patterns_are_pefts(name):
    for keys in itertools.permutations(["q_proj", r"layers\.\d+\.self_attn\..*", "down_proj", r".*", "0.q"], 2):
        pattern = {key: i for i, key in enumerate(keys)}
        assert pattern_value(pattern, name, -1) == pattern.get(get_pattern_key(list(keys), name), -1)


@pytest.mark.parametrize("expression", [*SLOW, *HUGE, *BROKEN])
def test_every_expression_comes_to_an_end(expression):
    start, refused = time.process_time(), []
    for name in NAMES:
        try:
            matches(expression, name, whole=True)
        except InputError as error:
            refused.append(error)
            break
    assert all(error.code in ("slow-pattern", "bad-pattern") and len(str(error)) < 400 for error in refused)
    assert time.process_time() - start < 5
