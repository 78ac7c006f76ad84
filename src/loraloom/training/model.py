"""The model of a run: base weights, quantised or not, a head for the task, and the method's adapters on top."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.builtin import BUILT_IN, builtin_path
from loraloom.training.composition import compose_members
from loraloom.training.config import (
    COMPOSITION,
    EXPANSION_KEYS,
    SELECTION_KEYS,
    TASKS_WITH_HEAD,
    MethodSection,
    ModelSection,
    RunConfig,
    Task,
)
from loraloom.training.tasks import get_task
from loraloom.training.tasks.base import RunData
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.lora import as_lora
from loraloom.tuner.quantized import prevent_cpu_repacking
from loraloom.tuner.speed_up import speed_up

DEFAULT_MAX_LENGTH = 256


def model_path(name: str) -> str:
    """The hub id or directory to load: `name` itself, or the folder of the model that `builtin:...` stands for.

    Raises:
        InputError: the package that carries the built-in model is not installed, or a local folder is not there.
    """
    if name in BUILT_IN:
        return builtin_path(name)
    if name.startswith("builtin:"):
        raise InputError(
            f"model.name {name!r}: there is {' and '.join(BUILT_IN)}{did_you_mean(name, list(BUILT_IN))}",
            code="unknown-builtin",
        )
    _check_local(name)
    return name


def _check_local(name: str) -> None:
    """Raises InputError for a folder that is not there; the hub, asked for it, would answer with another error."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if path.exists() or not (looks_local or (path.parent != Path() and path.parent.is_dir())):
        return
    near = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
    raise InputError(f"model.name {name!r}: no such folder{did_you_mean(name, near)}", code="no-folder")


def load_processor(section: ModelSection) -> Any:
    """The model's tokenizer, or image processor.

    Raises:
        InputError: there is none under this name.
    """
    path = model_path(section.name)
    try:
        return get_task(section.task).load_processor(path)
    except (OSError, ValueError) as error:
        raise _cannot_load(section, error) from error


def longest(section: ModelSection, processor: Any) -> int | None:
    """Tokens that the model has positions for; None where any number will do.

    Raises:
        InputError: there is no such model.
    """
    path = model_path(section.name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _cannot_load(section, error) from error
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0 or section.task == "image-classification":
        return None
    # RoBERTa and its relatives start to count behind the padding token: their tokenizers know.
    limit = getattr(processor, "model_max_length", None) if section.task in TASKS_WITH_HEAD else None
    return min(positions, limit or positions)


def resolve_max_length(config: RunConfig, processor: Any) -> int:
    """Tokens after which a text is cut: `data.max_length`, or its default.

    Raises:
        InputError: the model has no positions for so many.
    """
    limit, asked = longest(config.model, processor), config.data.max_length
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and asked > limit:
        raise InputError(
            f"data.max_length {asked}: {config.model.name!r} has {limit} positions: lower it to {limit} or less",
            code="too-long",
        )
    return asked


def load_base(
    section: ModelSection, data: RunData, processor: Any, path: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The base model in the precision asked for, with a head for the task.

    Args:
        section: `model` of RUN.yaml.
        data: the rows, whose labels the head is for.
        processor: a tokenizer's padding token becomes the model's.
        path: load the weights from here, instead of from `section.name`.

    Returns:
        The model, and the names of the modules that the checkpoint does not have (a new head): they start at random, so
        they have to be trained and saved in full.

    Raises:
        InputError: there is no such model, it does not fit the task, or bitsandbytes is missing.
    """
    task = get_task(section.task)
    options: dict[str, Any] = {"dtype": section.dtype, "output_loading_info": True, **task.model_options(data)}
    if section.quantization != "none":
        options["quantization_config"] = _quantization(section, [])
    name = path or model_path(section.name)
    try:
        model, info = task.auto_class.from_pretrained(name, **options)
        new = _new_modules(info)
        if new and section.quantization != "none":
            # A new head trains in full, which quantised weights cannot: load again and leave it as it is.
            options["quantization_config"] = _quantization(section, new)
            model, info = task.auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(section, error) from error
    if section.quantization != "none":
        prevent_cpu_repacking(model)  # also where PEFT's own layers come on top
    if getattr(processor, "pad_token_id", None) is not None:
        model.config.pad_token_id = processor.pad_token_id
    return model, new


def _new_modules(info: dict[str, Any]) -> list[str]:
    """The modules that the checkpoint lacks, or has in another shape."""
    keys = [*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))]
    return sorted({key.rpartition(".")[0] for key in keys})


def apply_method(model: PreTrainedModel, config: RunConfig, new_modules: list[str]) -> PreTrainedModel | peft.PeftModel:
    """Make trainable what the method trains: adapters on frozen weights, the head alone, or everything.

    Args:
        model: the base model, changed in place.
        config: the run; its `method` and `model.task` are read.
        new_modules: modules that start at random, from `load_base`; they train in full, whatever the method.

    Raises:
        InputError: the method's keys contradict each other or match nothing in this model, or a member of a
            composition cannot be read or does not fit.
    """
    if config.method.name == "full":
        return model
    if config.method.name == "probe":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"{module}.") for module in new_modules))
        return model
    if config.method.name == COMPOSITION:
        peft_type = get_task(config.model.task).peft_type
        return compose_members(model, config.composition, peft_type, new_modules)
    try:
        ours = adapter_config(config.method, config.model.task, new_modules)
        lora = as_lora(ours, model)
        if lora is None:
            return peft.get_peft_model(model, ours)
        adapted = peft.get_peft_model(model, lora)  # so that everything that reads LoRA reads the result
        speed_up(adapted)
        return adapted
    except (ValueError, TypeError) as error:
        raise InputError(f"method: {' '.join(str(error).split())}", code="method") from error


def adapter_config(method: MethodSection, task: Task, new_modules: list[str]) -> LoomConfig:
    """The adapter's configuration: the constructor that `method.name` names, with every key that was set."""
    others = ("name", *SELECTION_KEYS, *EXPANSION_KEYS)
    keys = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in others}
    keys = {key: value for key, value in keys.items() if value is not None}
    if new_modules:
        keys["modules_to_save"] = sorted({*keys.get("modules_to_save", []), *new_modules})
    return getattr(LoomConfig, method.name.removesuffix("+"))(task_type=get_task(task).peft_type, **keys)


def _quantization(section: ModelSection, skip: list[str]) -> BitsAndBytesConfig:
    """How the base is quantised; `skip`: modules that stay as they are (None there means transformers' own choice)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"model.quantization {section.quantization!r} needs: pip install 'loraloom[quant]'", code="missing-package"
        )
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip or None)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # bitsandbytes' default is fp4
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if section.dtype in ("float32", "auto") else getattr(torch, section.dtype),
        llm_int8_skip_modules=skip or None,  # bitsandbytes' name for it in 4 bits too
    )


def _cannot_load(section: ModelSection, error: Exception) -> InputError:
    return InputError(
        f"model.name {section.name!r} cannot be loaded for {section.task}: {' '.join(str(error).split())[:300]}",
        code="no-model",
    )
