"""`loraloom compose RUN.yaml --section.key value ...`"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from loraloom.cli.options import Saving
from loraloom.cli.train import run_verb
from loraloom.training.config import (
    COMPOSITION,
    CompositionSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    OutputSection,
)


# The sections are fields for the help alone: `load_config` reads their values as YAML, as it reads the file.
@dataclass
class Compose(Saving):
    """Make one adapter of trained ones: learn how much of each a few examples of a new task need.

    The adapters stay as they are. The result is saved as a composition, and as an ordinary LoRA in portable/.
    """

    run: tyro.conf.Positional[Path | None] = None
    """RUN.yaml with composition.members; every other key has a default."""
    resume: bool = False
    """Go on from the last complete checkpoint in output.dir."""
    nproc: int = 1
    """Processes to train with on this machine, one per GPU, or on the CPU."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    composition: CompositionSection = field(default_factory=CompositionSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    output: OutputSection = field(default_factory=OutputSection)


def main(arguments: Sequence[str]) -> None:
    """Compose, train what trains, and show or print the result."""
    run_verb("compose", Compose, arguments, COMPOSITION)
