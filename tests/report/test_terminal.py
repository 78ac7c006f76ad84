"""On the terminal a report says the same, with and without colours."""

import pytest
from rich.console import Console

from loraloom.report import render_terminal

from .support import HOSTILE, full_report


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_it_says_what_the_page_says(colours):
    console = Console(width=160, color_system=colours, force_terminal=colours is not None)
    with console.capture() as captured:
        console.print(render_terminal(full_report()))
    text = captured.get()
    for part in (
        HOSTILE,  # square brackets are no markup
        "0.1277 before",
        "2.8 to 0.3",
        "1.86 GiB",
        "no result",
        "λ = 0.3",
        "up_proj",
        "gate by layer and module: 863 values",  # too wide for a terminal
        "Words alone",
    ):
        assert part in text
    assert ("\x1b[" in text) == (colours is not None)
