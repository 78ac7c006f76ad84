"""The defaults that RUN.yaml's help names are those of the library."""

import ast
import inspect
import re
import textwrap

import pytest

from loraloom.selection import AdapterSelection, HalveAndDouble
from loraloom.selection.checks import DEFAULT_KEEP
from loraloom.training.config import EXPANSION_KEYS, SELECTION_KEYS, MethodSection

DEFAULTS = {name: p.default for name, p in inspect.signature(AdapterSelection).parameters.items()}
DEFAULTS |= {"keep": DEFAULT_KEEP, "expand_times": HalveAndDouble.times, "expand_every": HalveAndDouble.every}


def helps() -> dict[str, str]:
    (section,) = ast.parse(textwrap.dedent(inspect.getsource(MethodSection))).body
    fields = [node.target.id for node in section.body if isinstance(node, ast.AnnAssign)]
    texts = [node.value.value for node in section.body if isinstance(node, ast.Expr)]
    return dict(zip(fields[-len(texts) :], texts[-len(fields) :], strict=True))


@pytest.mark.parametrize("key", [key for key in (*SELECTION_KEYS, *EXPANSION_KEYS) if key != "expand_parameters"])
def test_the_help_of_a_key_has_the_librarys_default(key: str) -> None:
    found = re.search(r"Default: ([\w.]+?)\.?(?:\s|$)", helps()[key])
    assert found, helps()[key]
    assert found[1] == str(DEFAULTS[key]).lower()
