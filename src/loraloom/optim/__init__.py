"""Optimizers for adapters and for whole models, their parameter groups, and the memory they take.

Names are loaded when they are used: the options alone, which RUN.yaml is checked against, need no torch.
"""

import importlib
from typing import Any

_EXPORTS = {
    "loraloom.optim.build": ("build_optimizer", "trainer_optimizer"),
    "loraloom.optim.galore.groups": ("project_groups",),
    "loraloom.optim.galore.methods": ("APOLLO", "Fira", "GaLore"),
    "loraloom.optim.memory": ("Memory", "adamw_memory", "expected_memory", "format_galore", "state_bytes"),
    "loraloom.optim.muon": ("Muon",),
    "loraloom.optim.param_groups": ("build_param_groups", "format_param_groups"),
    "loraloom.optim.registry": ("OPTIMIZERS", "check_optimizer_options"),
    "loraloom.optim.surgery": ("remove_parameters", "replace_parameter"),
    "loraloom.optim.weight_adam": ("WeightAdam",),
    "loraloom.update.simplex": (
        *("Constraint", "KSparse", "Simplex", "SimplexKSparse"),
        *("project_k_sparse", "project_simplex", "project_simplex_k_sparse"),
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'loraloom.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
