"""What tests of whole runs share: variants of a configuration, saved weights, a Ctrl-C in a given step."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from loraloom.errors import InputError


def with_method(config, name, **keys):
    adapter = name not in ("full", "probe")
    method = dataclasses.replace(config.method, name=name, **keys) if adapter else type(config.method)(name=name)
    return dataclasses.replace(config, method=method)


def with_training(config, **keys):
    return dataclasses.replace(config, training={**config.training, **keys})


def with_optimizer(config, **keys):
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **keys))


def elsewhere(config, directory):
    return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(directory)))


def weights(folder):
    name = "adapter_model.safetensors" if (Path(folder) / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(Path(folder) / name)


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class StopAt(TrainerCallback):
    """Sends the process a Ctrl-C in the middle of an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def assert_error(code, named, action):
    """`action` raises an InputError with this code, whose one line names what it is about."""
    with pytest.raises(InputError) as caught:
        action()
    assert caught.value.code == code, caught.value
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
