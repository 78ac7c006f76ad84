"""LoomConfig: constructors, refusals, and names that match nothing."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from loraloom import LoomConfig
from loraloom.errors import InputError
from tests.models import llama
from tests.tuner.support import ALL_PARTS, Pair


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(x) + self.v_proj(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def targeted(model):
    return sorted(
        {
            n.split(".loom_lora_A")[0].removeprefix("base_model.model.")
            for n in model.state_dict()
            if ".loom_lora_A" in n
        }
    )


@pytest.mark.parametrize(
    ("constructor", "parts"),
    [
        ("lora", {}),
        ("moslora", {"use_mixer": "orthogonal"}),
        ("dora", {"use_dora": True}),
        ("weightlora", {"use_gate": True}),
    ],
)
def test_constructors_name_a_choice_of_parts(constructor, parts):
    config = getattr(LoomConfig, constructor)(r=4, target_modules=["x"])
    assert config == LoomConfig(r=4, target_modules=["x"], **parts)


def test_a_constructors_part_can_be_chosen():
    assert LoomConfig.moslora(use_mixer="kaiming", use_dora=True).use_mixer == "kaiming"


def test_from_lora_copies_what_both_have():
    lora = LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.1,
        target_modules=["a", "b"],
        rank_pattern={"a": 2},
        alpha_pattern={"b": 7},
        bias="lora_only",
        use_rslora=True,
        use_dora=True,
        modules_to_save=["head"],
        task_type="CAUSAL_LM",
    )
    config = LoomConfig.from_lora(lora)
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "task_type"):
        assert getattr(config, name) == getattr(lora, name)
    assert (config.use_rslora, config.use_dora, config.modules_to_save) == (True, True, ["head"])
    assert config.bias == "loom_only"
    assert config.peft_type.value == "LOOM"


def test_the_config_survives_a_file(tmp_path):
    config = LoomConfig(r=4, target_modules=["q"], task_type="CAUSAL_LM", **ALL_PARTS)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is LoomConfig
    assert loaded == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("use_mixer", "othogonal"),
        ("use_mixer", True),
        ("init_lora_weights", "loftq"),
        ("bias", "lora_only"),
        ("rank_pattern", {"q": -1}),
        ("loom_format_version", 99),
    ],
)
def test_a_value_out_of_range_is_echoed(field, value):
    with pytest.raises(ValueError, match=field if field != "rank_pattern" else "q"):
        LoomConfig(**{"target_modules": ["q"], field: value})


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(TypeError, match="use_mixer"):
        LoomConfig(use_mixr="orthogonal")


@pytest.mark.parametrize(
    ("kwargs", "wrong", "nearest"),
    [
        ({"target_modules": ["q_proj", "value_proj"]}, "value_proj", "v_proj"),
        ({"target_modules": ["q_prj"]}, "q_prj", "q_proj"),
        ({"target_modules": r".*\.w_proj"}, "w_proj", "v_proj"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_prj": 2}}, "v_prj", "q_proj"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "v_proj", "q_proj"),
        ({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_porj": 2}}, "q_porj", "q_proj"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest_names(kwargs, wrong, nearest):
    with pytest.raises(ValueError, match=wrong.replace("\\", "\\\\")) as error:
        get_peft_model(Stack(), LoomConfig(**kwargs))
    assert nearest in str(error.value).replace(repr(wrong), "")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "value_proj"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"v_prj": 2}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"v_prj": 2}},
    ],
)
def test_allow_unmatched_makes_it_a_warning(kwargs):
    with pytest.warns(RuntimeWarning, match="value_proj|v_prj"):
        model = get_peft_model(Stack(), LoomConfig(allow_unmatched=True, **kwargs))
    assert targeted(model) == [f"layers.{i}.q_proj" for i in range(3)]


def test_a_failed_injection_leaves_the_model_as_it_was():
    model = Stack()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="value_proj"):
        get_peft_model(model, LoomConfig(target_modules=["q_proj", "value_proj"]))
    assert [type(module) for module in model.modules()] == before


def test_a_second_adapter_with_a_typo_is_an_error_too():
    model = get_peft_model(Stack(), LoomConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="value_proj"):
        model.add_adapter("second", LoomConfig(target_modules=["v_proj", "value_proj"]))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
        ({"target_modules": ["layers.1.q_proj", "head"]}, ["head", "layers.1.q_proj"]),
        ({"target_modules": r"layers\.[02]\.v_proj"}, ["layers.0.v_proj", "layers.2.v_proj"]),
        ({"target_modules": ["v_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}, ["layers.2.v_proj"]),
        (
            {"target_modules": ["v_proj"], "exclude_modules": ["layers.0.v_proj"]},
            ["layers.1.v_proj", "layers.2.v_proj"],
        ),
        ({"target_modules": ["embed", "head"]}, ["embed", "head"]),
    ],
)
def test_targets_are_pefts(kwargs, expected):
    assert targeted(get_peft_model(Stack(), LoomConfig(**kwargs))) == expected


def test_a_second_all_linear_adapter_finds_the_same_modules(pico_llama_dir):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico_llama_dir), LoomConfig(target_modules="all-linear", r=2), "one"
    )
    model.add_adapter("two", LoomConfig(target_modules="all-linear", r=3, **ALL_PARTS))
    modules = {
        name: {n.split(".loom_lora_A")[0] for n in model.state_dict() if f".loom_lora_A.{name}." in n}
        for name in ("one", "two")
    }
    assert modules["one"] == modules["two"]
    assert len(modules["one"]) == 14  # 7 linears in each of 2 layers, the head left out


def test_target_modules_none_takes_the_architectures_default(pico_llama_dir):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pico_llama_dir), LoomConfig(r=2))
    assert {name.rsplit(".", 1)[1] for name in targeted(model)} == {"q_proj", "v_proj"}


def test_patterns_set_rank_and_alpha_per_module():
    config = LoomConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.q_proj": 2, r"layers\.2\..*": 3},
        alpha_pattern={"v_proj": 12},
    )
    model = get_peft_model(Stack(), config)
    ranks = {
        n.split(".loom_lora_A")[0]: p.shape[0]
        for n, p in model.base_model.model.named_parameters()
        if "loom_lora_A" in n
    }
    assert [ranks[f"layers.{i}.q_proj"] for i in range(3)] == [4, 2, 3]
    assert [ranks[f"layers.{i}.v_proj"] for i in range(3)] == [4, 4, 3]
    scaling = {i: model.base_model.model.layers[i].v_proj.scaling["default"] for i in range(3)}
    assert scaling == {0: 3.0, 1: 3.0, 2: 4.0}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("loom_only", {"first.base_layer.bias"}),
        ("all", {"first.base_layer.bias", "second.bias"}),
    ],
)
def test_bias_says_which_biases_train(bias, expected):
    model = get_peft_model(Pair(), LoomConfig(target_modules=["first"], bias=bias))
    names = {
        n.removeprefix("base_model.model.")
        for n, p in model.named_parameters()
        if p.requires_grad and ".loom_" not in n
    }
    assert names == expected


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_trained_bias_gets_its_gradient(dora):
    """DoRA leaves the bias alone, so that dL/dbias is the sum of dL/dy in both."""
    model = get_peft_model(Pair(), LoomConfig(target_modules=["second"], bias="loom_only", use_dora=dora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loom_" in name:
                parameter.add_(0.3)
    output = model(torch.randn(3, 8))
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    torch.testing.assert_close(model.get_base_model().second.get_base_layer().bias.grad, weight.sum(0))


def test_unsupported_modules_are_refused_by_name():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.target = nn.LayerNorm(4)

    with pytest.raises(ValueError, match="LayerNorm"):
        get_peft_model(Bad(), LoomConfig(target_modules=["target"]))


def test_modules_to_save_trains_and_saves_a_head(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    config = LoomConfig(target_modules=["q_proj"], modules_to_save=["head"], **ALL_PARTS)
    torch.manual_seed(0)
    model = get_peft_model(Stack(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    model.save_pretrained(tmp_path)
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= set(
        load_file(tmp_path / "adapter_model.safetensors")
    )
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Stack(), tmp_path).eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


JSON = [None, True, 0, -1, 1.5, float("nan"), float("inf"), "false", "", [], ["x"], [1], [[]], {}, {"a": 1}, {"a": "x"}]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoomConfig) if field.name != "peft_type"])
def test_a_value_of_any_type_is_taken_or_refused_in_one_line(field):
    """A file may hold anything."""
    said = []
    for value in JSON:
        try:
            LoomConfig(**{field: value})
        except ValueError as error:
            said.append(str(error))
    assert not any("\n" in message for message in said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "false"),
        ("lora_alpha", float("nan")),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("rank_pattern", ["q_proj"]),
        ("target_modules", [1]),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", 1.5),
        ("trainable_token_indices", ["a"]),
        ("lora_dropout", "0.1"),
    ],
)
def test_a_wrong_type_is_named(field, value):
    with pytest.raises(InputError) as caught:
        LoomConfig(**{field: value})
    assert caught.value.code == "config-type"
    assert field in str(caught.value)


@pytest.mark.parametrize("key", ["r", "rank_pattern"])
def test_a_rank_that_the_file_does_not_hold_is_refused_before_it_is_allocated(tmp_path, key):
    get_peft_model(llama(), LoomConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    large = 10**9 if key == "r" else {"q_proj": 10**9}
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: large}))
    with pytest.raises(InputError) as caught:
        PeftModel.from_pretrained(llama(), tmp_path)
    assert caught.value.code == "rank"


def test_an_expression_that_takes_for_ever_is_refused(tmp_path):
    get_peft_model(llama(), LoomConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    for key in ("target_modules", "exclude_modules"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: r"(.*)*(.*)*(.*)*(.*)*!"}))
        with pytest.raises(ValueError, match=r"."):  # at once: `re` would not come back
            PeftModel.from_pretrained(llama(), tmp_path)
