"""WeightLoRA over time: warm up, select the adapters that matter, disconnect the rest, widen the chosen ones."""

from loraloom.selection.callback import SelectionCallback, format_selection
from loraloom.selection.phases import FillBudget, HalveAndDouble
from loraloom.selection.selection import FILE_NAME, AdapterSelection

__all__ = ["FILE_NAME", "AdapterSelection", "FillBudget", "HalveAndDouble", "SelectionCallback", "format_selection"]
