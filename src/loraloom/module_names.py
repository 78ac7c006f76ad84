"""Moves to its callers."""

from loraloom.text import place as place
from loraloom.text import short_names as short_names
