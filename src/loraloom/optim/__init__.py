"""Optimizers for adapters: WeightAdam, its constraint sets, and the parameter groups that every optimizer takes."""

from .projections import (
    KSparse,
    Simplex,
    SimplexKSparse,
    project_k_sparse,
    project_simplex,
    project_simplex_k_sparse,
)

__all__ = [
    "KSparse",
    "Simplex",
    "SimplexKSparse",
    "project_k_sparse",
    "project_simplex",
    "project_simplex_k_sparse",
]
