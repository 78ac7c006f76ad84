"""What selection.json says of a run: gates over time, when adapters were dropped or widened. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "selection.json"


@dataclass(frozen=True)
class SelectionLog:
    """The part of `AdapterSelection.state_dict` that tells what happened."""

    modules: list[str]
    history: list[dict[str, Any]]
    """Per step with gates: `step`, and `gates` in the order of the modules, None for a module that was dropped."""
    events: list[dict[str, Any]]
    """`step` and `event`: "disconnect" with `modules`, or "expand" with `ranks`."""


def read_selection(folder: Path) -> SelectionLog | None:
    """The log in a run's folder; None if nothing was selected."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    return SelectionLog(state["modules"], state["history"], state["events"])
