"""The PEFT tuner, adapter type ``LOOM``."""

import peft  # noqa: F401  (the hook in loraloom/__init__.py then imports loraloom.tuner.model, which registers the type)
