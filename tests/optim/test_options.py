"""Each option stands in one place: its default is the same in the library, in RUN.yaml and in the documentation."""

import ast
import inspect
import itertools
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from loraloom.optim import build_param_groups, options
from loraloom.optim.options import GroupOptions
from loraloom.optim.registry import INNER, OPTIMIZERS, import_optimizer
from loraloom.optim.section import help_texts, optimizer_section

CHOICES = {**OPTIMIZERS, **{f"inner {name}": choice for name, choice in INNER.items()}}
PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
START, END = "<!-- options: made by tests/optim/test_options.py -->\n", "<!-- end of options -->\n"


@pytest.mark.parametrize("name", CHOICES)
def test_the_class_has_the_options_of_its_dataclass_with_their_defaults(name: str) -> None:
    choice = CHOICES[name]
    parameters = inspect.signature(import_optimizer(name.removeprefix("inner "), {**INNER, **OPTIMIZERS})).parameters
    for f in fields(choice.options):
        assert parameters[f.name].default == getattr(choice.options(), f.name), f.name
    assert set(choice.arguments) <= parameters.keys()


def test_parameter_groups_have_their_defaults() -> None:
    parameters = inspect.signature(build_param_groups).parameters
    assert {f.name: f.default for f in fields(GroupOptions)} == {
        name: parameter.default for name, parameter in parameters.items() if name not in ("model", "lr")
    }


def test_run_yaml_has_every_option_and_no_other() -> None:
    known = {"name"} | {f.name for f in fields(GroupOptions)}
    known |= {f.name for choice in CHOICES.values() for f in fields(choice.options)}
    assert {f.name for f in fields(optimizer_section())} == known


def test_every_option_has_a_help_and_only_one() -> None:
    """A subclass may change a default; a second text would drift from the first."""
    texts = help_texts()
    written: list[str] = []
    for cls in ast.parse(inspect.getsource(options)).body:
        body = getattr(cls, "body", [])
        for statement, after in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                written.append(statement.target.id)
    assert len(written) == len(set(written))
    named = {f.name for cls in vars(options).values() if is_dataclass(cls) for f in fields(cls)}
    assert named == texts.keys() == set(written)


def table() -> str:
    """Every option with its default, its optimizers and its help, in Markdown."""
    own = optimizer_section()
    texts, hidden = help_texts(), {"name"}
    rows = ["| option | default | of | |", "|---|---|---|---|"]
    for f in fields(own):
        if f.name in hidden:
            continue
        defaults = {name: getattr(choice.options(), f.name, None) for name, choice in CHOICES.items()}
        takers = [n for n, choice in CHOICES.items() if f.name in choice.honors and n.removeprefix("inner ") != n]
        takers = [n for n, choice in OPTIMIZERS.items() if f.name in choice.honors] or takers
        values = [defaults[taker] for taker in takers] or [f.default]
        usual = max(values, key=values.count)
        others = "".join(f", {n} `{defaults[n]}`" for n in takers if defaults[n] != usual)
        shown = "" if usual in (None, {}) else f"`{usual}`"
        rows.append(f"| `{f.name}` | {shown}{others} | {', '.join(takers) or 'all'} | {texts[f.name]} |")
    return "\n".join(rows) + "\n"


def test_the_documentation_is_made_of_them() -> None:
    """After a change: `python -m tests.optim.test_options` writes the table anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    assert before
    assert rest.partition(END)[0] == table()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2], encoding="utf-8")
