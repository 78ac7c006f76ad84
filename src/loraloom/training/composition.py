"""A composition in a run: the section `composition` as one adapter, and what it learned."""

import dataclasses
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from loraloom.adapter.open import open_adapter
from loraloom.adapter.stored import CONFIG
from loraloom.composition import compose, learned_weights, to_lora
from loraloom.errors import InputError
from loraloom.export.export import export_adapter
from loraloom.training.config import CompositionSection

PORTABLE = "portable"
ADAPTER = "default"  # PEFT saves an adapter of any other name in a folder of its own


@dataclass(frozen=True)
class Composed:
    """What a run made of the members."""

    weights: dict[str, dict[str, float]]
    """Weight of each member, by module; a member that does not adapt a module has none there."""
    mean: dict[str, float]
    """Mean of each member's weights over the modules that it adapts."""
    portable: str
    """Folder with the same as an ordinary LoRA."""
    rank: int
    """Its rank: in the widest module, the sum of the members'."""


def compose_members(
    model: PreTrainedModel, section: CompositionSection, task_type: str | None, new_modules: list[str]
) -> PeftModel:
    """The members as one adapter of the model.

    Args:
        model: the base model, changed in place.
        section: `composition` of RUN.yaml.
        task_type: PEFT's name of the task.
        new_modules: modules that start at random, from `load_base`; they train beside the weights.

    Raises:
        InputError: a member cannot be read, or does not fit the base model or the weights.
    """
    options = dataclasses.asdict(section)
    members, weights = options.pop("members"), options.pop("weights")
    options |= {"adapter_name": ADAPTER, "task_type": task_type, "modules_to_save": new_modules or None}
    heads = "|".join(map(re.escape, new_modules))
    try:
        with warnings.catch_warnings():
            # The members' heads are for their own tasks, so that they stay out goes without saying.
            warnings.filterwarnings("ignore", rf"member .*: ({heads}), which was trained in full, stays out")
            return compose(model, members, weights, **options)
    except ValueError as error:
        raise InputError(f"composition: {' '.join(str(error).split())}", code="composition") from error


def write_portable(output: Path) -> str | None:
    """Export the adapter of a run's folder into a folder of it as a plain LoRA, compared with it; or say why not.

    Nothing is done where the adapter is a LoRA already, or the run trained none.

    Returns:
        Why there is no such folder, or None.
    """
    if not (output / CONFIG).is_file() or open_adapter(output).config["peft_type"] == "LORA":
        return None
    try:
        # A trained head is saved with the adapter, which PEFT takes and servers do not.
        heads = bool(open_adapter(output).config.get("modules_to_save"))
        export_adapter(output, "peft" if heads else "portable", output / PORTABLE, overwrite=True)
    except InputError as error:
        return str(error)
    return None


def finish_composition(model: PeftModel | PreTrainedModel, output: Path) -> Composed:
    """Save the composition as an ordinary LoRA in a folder of `output`, and read off its weights."""
    model = cast(PeftModel, model)
    learned = learned_weights(model, ADAPTER)
    folder = output / PORTABLE
    report = to_lora(model, ADAPTER, save_to=folder, overwrite=True)
    return Composed(learned.layers, learned.mean, str(folder), report.rank)
