"""loraloom: low-rank fine-tuning methods for PEFT in one adapter whose parts combine.

Importing this package imports neither torch nor PEFT. It registers the adapter type ``LOOM`` with PEFT as soon as
PEFT is imported, whichever of the two comes first.
"""

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"

_EXPORTS = {
    # adapters that train
    "LoomConfig": "loraloom.tuner.config",
    "LoomModel": "loraloom.tuner.model",
    "load_lora": "loraloom.tuner.lora",
    "speed_up": "loraloom.tuner.speed_up",
    "slow_down": "loraloom.tuner.speed_up",
    # compositions
    "compose": "loraloom.composition",
    "learned_weights": "loraloom.composition",
    "format_weights": "loraloom.composition",
    "penalty": "loraloom.composition",
    "to_lora": "loraloom.composition",
    # optimizers
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
    "state_bytes": "loraloom.optim",
    # WeightLoRA's selection
    "AdapterSelection": "loraloom.selection",
    "SelectionCallback": "loraloom.selection",
    "HalveAndDouble": "loraloom.selection",
    "FillBudget": "loraloom.selection",
    "format_selection": "loraloom.selection",
    # adapters and models on disk
    "open_adapter": "loraloom.adapter.open",
    "inspect_adapter": "loraloom.adapter.inspect",
    "export_adapter": "loraloom.export.export",
    "merge_checkpoint": "loraloom.merge.merge",
    "combine_adapters": "loraloom.combine.combine",
    "shrink_adapter": "loraloom.shrink.shrink",
    "extract_adapter": "loraloom.extract.extract",
    # before training
    "suggest_ranks": "loraloom.ranks.ranks",
    # intruder dimensions
    "find_intruders": "loraloom.intruders.live",
    "reduce_intruders": "loraloom.intruders.live",
    "sweep_intruders": "loraloom.intruders.live",
    "merge_with_reduced_intruders": "loraloom.intruders.live",
    "BasisCache": "loraloom.intruders.solvers.basis",
    # errors
    "InputError": "loraloom.errors",
    "RunFailedError": "loraloom.errors",
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
