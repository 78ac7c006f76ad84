"""loraloom: low-rank fine-tuning methods for PEFT in one adapter whose parts combine.

Importing this package imports neither torch nor PEFT. It registers the adapter type ``LOOM`` with PEFT as soon as
PEFT is imported, whichever of the two comes first.
"""

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"

_EXPORTS = {
    "LoomConfig": "loraloom.tuner.config",
    "LoomModel": "loraloom.tuner.model",
    "open_adapter": "loraloom.adapter.open",
    "inspect_adapter": "loraloom.adapter.inspect",
    "export_adapter": "loraloom.export.export",
    "compose": "loraloom.composition",
    "to_lora": "loraloom.composition",
    "merge_checkpoint": "loraloom.merge.merge",
    "find_intruders": "loraloom.intruders.live",
    "reduce_intruders": "loraloom.intruders.live",
    "load_lora": "loraloom.tuner.lora",
    "GaLore": "loraloom.optim",
    "Fira": "loraloom.optim",
    "APOLLO": "loraloom.optim",
    "Muon": "loraloom.optim",
    "WeightAdam": "loraloom.optim",
    "KSparse": "loraloom.optim",
    "Simplex": "loraloom.optim",
    "SimplexKSparse": "loraloom.optim",
    "build_optimizer": "loraloom.optim",
    "build_param_groups": "loraloom.optim",
    "expected_memory": "loraloom.optim",
    "format_galore": "loraloom.optim",
    "format_param_groups": "loraloom.optim",
    "trainer_optimizer": "loraloom.optim",
    "AdapterSelection": "loraloom.selection",
    "SelectionCallback": "loraloom.selection",
    "HalveAndDouble": "loraloom.selection",
    "FillBudget": "loraloom.selection",
    "format_selection": "loraloom.selection",
    "speed_up": "loraloom.tuner.speed_up",
    "slow_down": "loraloom.tuner.speed_up",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'loraloom' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


@wrapt.when_imported("peft")
def _register(_peft: Any) -> None:
    importlib.import_module("loraloom.tuner.model")
