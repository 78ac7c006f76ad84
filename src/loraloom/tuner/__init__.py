"""The PEFT tuner. Importing it registers the adapter type ``LOOM``."""

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.model import LoomModel
from loraloom.tuner.registration import register

__all__ = ["LoomConfig", "LoomModel"]

register(LoomConfig, LoomModel)
