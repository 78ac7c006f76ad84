"""Which versions made a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

from loraloom import __version__

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors")


def installed_versions() -> dict[str, str]:
    """Versions of loraloom, Python, and of the packages that decide the numbers, as far as they are installed."""
    found = {"loraloom": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
