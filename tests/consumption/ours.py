"""What the matrix takes from the package: the only file in this folder that imports it."""

from loraloom import LoomConfig, compose, speed_up
from loraloom.adapter.inspect import inspect_adapter
from loraloom.composition.to_lora import to_lora
from loraloom.errors import LoraloomError
from loraloom.export.export import export_adapter
from loraloom.intruders.live import find_intruders, merge_with_reduced_intruders, reduce_intruders
from loraloom.intruders.stored import find_stored_intruders, reduce_stored_intruders
from loraloom.merge.merge import merge_checkpoint
from loraloom.optim import WeightAdam, build_optimizer
from loraloom.selection import AdapterSelection, HalveAndDouble

__all__ = [
    "AdapterSelection",
    "HalveAndDouble",
    "LoomConfig",
    "LoraloomError",
    "WeightAdam",
    "build_optimizer",
    "compose",
    "export_adapter",
    "find_intruders",
    "find_stored_intruders",
    "inspect_adapter",
    "merge_checkpoint",
    "merge_with_reduced_intruders",
    "reduce_intruders",
    "reduce_stored_intruders",
    "speed_up",
    "to_lora",
]
