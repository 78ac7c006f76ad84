"""Optimizers for adapters: WeightAdam, its constraint sets, and the parameter groups that every optimizer takes."""

from loraloom.optim.build import OPTIMIZERS, build_optimizer, check_optimizer_options, trainer_optimizer
from loraloom.optim.galore.engine import GaLore
from loraloom.optim.galore.groups import project_groups
from loraloom.optim.memory import Memory, adamw_memory, expected_memory, format_galore, state_bytes
from loraloom.optim.param_groups import build_param_groups, format_param_groups
from loraloom.optim.surgery import remove_parameters, replace_parameter
from loraloom.optim.weight_adam import WeightAdam
from loraloom.update.simplex import (
    Constraint,
    KSparse,
    Simplex,
    SimplexKSparse,
    project_k_sparse,
    project_simplex,
    project_simplex_k_sparse,
)

__all__ = [
    "OPTIMIZERS",
    "Constraint",
    "GaLore",
    "KSparse",
    "Memory",
    "Simplex",
    "SimplexKSparse",
    "WeightAdam",
    "adamw_memory",
    "build_optimizer",
    "build_param_groups",
    "check_optimizer_options",
    "expected_memory",
    "format_galore",
    "format_param_groups",
    "project_groups",
    "project_k_sparse",
    "project_simplex",
    "project_simplex_k_sparse",
    "remove_parameters",
    "replace_parameter",
    "state_bytes",
    "trainer_optimizer",
]
