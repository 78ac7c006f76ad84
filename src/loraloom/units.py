"""Moves to its callers."""

from loraloom.text import readable_bytes as readable_bytes
