"""What a run trains for: one file per task, each with a `TASK` that answers what `base.Task` asks.

Importing this package imports no torch; `get_task` loads the one file that is needed.
"""

import importlib
from typing import TYPE_CHECKING

from loraloom.training.config import Task as Name

if TYPE_CHECKING:
    from loraloom.training.tasks.base import Task


def get_task(name: Name) -> "Task":
    """The task of this name: `text-classification` is in text_classification.py, and so on."""
    return importlib.import_module(f"loraloom.training.tasks.{name.replace('-', '_')}").TASK
