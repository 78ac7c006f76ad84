"""``python -m scripts.loaders NAME WHEELS JOBS``: runs one server's loader on folders.

JOBS is a JSON file, a list of [folder of an adapter, folder of its base, file to write]. A file gets what the server
adds to each module, or beside it as .txt why it does not load.
"""

import importlib
import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from scripts.loaders.model import Sizes


def main(name: str, wheels: str, jobs: str) -> None:
    """Runs the jobs."""
    loader = importlib.import_module(f"scripts.loaders.{name}")
    loader.prepare(Path(wheels))
    for folder, base, out in json.loads(Path(jobs).read_text()):
        try:
            found = loader.effective(Path(folder), Sizes.read(Path(base)), Path(base))
            save_file({key: tensor.float().contiguous() for key, tensor in found.items()}, out)
        except Exception as error:  # whatever the server raises is its answer
            lines = str(error).strip().splitlines() or [type(error).__name__]
            Path(out).with_suffix(".txt").write_text(lines[0])


main(*sys.argv[1:])
