"""Every trainable parameter is in exactly one group, with the rate and the decay of its kind."""

from dataclasses import fields

import peft
import pytest
import torch
from torch import nn

from loraloom.errors import InputError
from loraloom.optim import build_param_groups, format_param_groups
from loraloom.optim.options import GroupOptions
from loraloom.optim.param_groups import GROUPS
from loraloom.update.parts import PARTS

from .support import Vector, gated_model


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.classifier(self.norm(self.linear(x)))


def peft_model(**options) -> nn.Module:
    settings = {"r": 2, "target_modules": ["embed", "conv", "linear"], "modules_to_save": ["classifier"], **options}
    return peft.get_peft_model(Base(), peft.LoraConfig(**settings))


def names_by_group(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    """Group name -> names of its parameters without the wrapper's prefix and the adapter's name."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    short = lambda name: name.removeprefix("base_model.model.").replace(".default", "").replace("base_layer.", "")  # noqa: E731
    return {group["name"]: [short(name_of[id(p)]) for p in group["params"]] for group in groups}


def assert_partition(model: nn.Module, groups: list[dict]) -> None:
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert len(set(grouped)) == len(grouped)


def test_plain_peft_lora() -> None:
    model = peft_model(bias="all")
    model.base_model.model.norm.requires_grad_(True)
    groups = build_param_groups(model, 1e-3, lora_plus_ratio=16, head_lr=5e-3, weight_decay=0.1)
    assert_partition(model, groups)
    assert names_by_group(model, groups) == {
        "lora_A": ["embed.lora_embedding_A", "conv.lora_A.weight", "linear.lora_A.weight"],
        "lora_B": ["embed.lora_embedding_B", "conv.lora_B.weight", "linear.lora_B.weight"],
        "heads": ["classifier.modules_to_save.weight"],
        "heads_no_decay": ["classifier.modules_to_save.bias"],
        "no_decay": ["conv.bias", "linear.bias", "norm.weight", "norm.bias"],
    }
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "lora_A": (1e-3, 0.1),
        "lora_B": (16e-3, 0.1),
        "heads": (5e-3, 0.1),
        "heads_no_decay": (5e-3, 0.0),
        "no_decay": (1e-3, 0.0),
    }


def test_dora_magnitudes_and_lora_biases_take_the_plain_rate_without_decay() -> None:
    # The magnitude of a convolution has four axes, and still no decay.
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True))
    groups = build_param_groups(model, 1e-3, lora_plus_ratio=16)
    assert_partition(model, groups)
    magnitudes = ["0.lora_magnitude_vector.weight", "2.lora_magnitude_vector.weight"]
    assert names_by_group(model, groups)["magnitudes"] == magnitudes
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}["magnitudes"] == (1e-3, 0.0)

    model = peft_model(target_modules=["linear"], lora_bias=True)
    groups = build_param_groups(model, 1e-3, lora_plus_ratio=16)
    assert names_by_group(model, groups)["no_decay"] == ["linear.lora_B.bias"]
    assert groups[-1]["lr"] == 1e-3


def test_gated_adapters_with_mixers_and_logits() -> None:
    model = gated_model(depth=2)
    model.layers[0].loom_mixer = nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})
    model.layers[0].loom_lora_magnitude_vector = nn.ModuleDict({"default": Vector(6)})
    model.layers[1].loom_logits_lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.zeros(3))})
    groups = build_param_groups(model, 1e-3, gate_lr=5.0, logit_lr=0.1, mixer_lr=2e-3, magnitude_lr=3e-3)
    assert_partition(model, groups)
    names = names_by_group(model, groups)
    assert names["lora_A"] == ["layers.0.loom_lora_A.weight", "layers.1.loom_lora_A.weight"]
    assert names["mixers"] == ["layers.0.loom_mixer.weight"]
    assert names["gates"] == [f"layers.{i}.loom_gate_lora_magnitude_vector.weight" for i in range(2)]
    assert names["logits"] == ["layers.1.loom_logits_lora_magnitude_vector"]
    assert names["magnitudes"] == ["layers.0.loom_lora_magnitude_vector.weight"]
    assert {group["name"]: (group["lr"], group["weight_decay"], group["is_gate"]) for group in groups} == {
        "lora_A": (1e-3, 1e-2, False),
        "mixers": (2e-3, 1e-2, False),
        "lora_B": (1e-3, 1e-2, False),
        "gates": (5.0, 0.0, True),
        "logits": (0.1, 0.0, False),
        "heads": (1e-3, 1e-2, False),
        "magnitudes": (3e-3, 0.0, False),
        "heads_no_decay": (1e-3, 0.0, False),
    }


def test_gates_without_a_rate_take_the_optimizers_default() -> None:
    groups = build_param_groups(gated_model(), 1e-3)
    assert {group["name"]: group["lr"] for group in torch.optim.AdamW(groups, lr=1e-3).param_groups}["gates"] == 1e-3


def test_a_model_without_adapters_is_split_by_decay() -> None:
    model = Base()
    model.embed.requires_grad_(False)
    groups = build_param_groups(model, 1e-3)
    assert_partition(model, groups)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("base", 1e-2), ("no_decay", 0.0)]


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        build_param_groups(Base().requires_grad_(False), 1e-3)
    assert caught.value.code == "nothing-to-train"


@pytest.mark.parametrize("option", [f.name for f in fields(GroupOptions) if f.name != "weight_decay"])
def test_a_rate_that_no_parameter_takes_is_an_error(option: str) -> None:
    with pytest.raises(InputError) as caught:
        build_param_groups(Base(), 1e-3, **{option: 0.5})
    assert caught.value.code == "nothing-for-rate"
    assert option in str(caught.value)


def test_every_trained_part_of_an_adapter_has_a_group() -> None:
    """A part that is new in the table of parts needs a row in the table of groups, or the import fails to find it."""
    assert {part.group for part in PARTS if part.group} <= {group.name for group in GROUPS}
    assert {group.rate for group in GROUPS if group.rate} | {"weight_decay"} == {f.name for f in fields(GroupOptions)}


def test_the_table_names_every_group_and_adds_up() -> None:
    model = gated_model()
    lines = format_param_groups(build_param_groups(model, 1e-3, lora_plus_ratio=16)).splitlines()
    assert lines[0].split() == ["group", "tensors", "parameters", "lr", "weight", "decay"]
    assert [line.split() for line in lines[1:]] == [
        ["lora_A", "4", "48", "0.001", "0.01"],
        ["lora_B", "4", "48", "0.016", "0.01"],
        ["gates", "4", "4", "default", "0"],
        ["heads", "1", "18", "0.001", "0.01"],
        ["heads_no_decay", "1", "3", "0.001", "0"],
        ["total", "14", "121"],
    ]
    # Groups as torch makes them have no names.
    assert "group 0" in format_param_groups(torch.optim.SGD(model.parameters(), lr=0.1).param_groups)
