"""RUN.yaml: every key has a default, the round trip is exact, and a mistake is one line that names the fix."""

import dataclasses
from pathlib import Path

import pytest

from loraloom.errors import InputError
from loraloom.training.config import (
    EXPANSION_KEYS,
    SECTIONS,
    SELECTION_KEYS,
    TRAINING_DEFAULTS,
    TRAINING_KEYS,
    MethodSection,
    OptimizerSection,
    RunConfig,
)
from loraloom.training.load import dump_config, load_config
from tests.refusals import coded


def write(tmp_path, text):
    path = tmp_path / "RUN.yaml"
    path.write_text(text)
    return path


def message(tmp_path, text, *overrides):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_file_is_the_defaults():
    assert load_config(None) == RunConfig()


def test_empty_file_and_empty_section_are_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == RunConfig()
    assert load_config(write(tmp_path, "model:\ndata:\n")) == RunConfig()


def test_resolved_file_reads_back_equal(tmp_path):
    text = """
    model: {name: some/model, task: causal-lm, dtype: bfloat16}
    data: {path: rows.jsonl, test_fraction: 0.25}
    method: {name: dora, r: 4, use_mixer: orthogonal, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 2}}
    optimizer: {name: adamw_8bit, lora_plus_ratio: 16, betas: [0.9, 0.99]}
    training: {learning_rate: 1e-4, lr_scheduler_type: cosine}
    """
    config = load_config(write(tmp_path, text))
    assert config != RunConfig()
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_every_key_has_a_default_and_help():
    import inspect

    for section in SECTIONS.values():
        # The section `optimizer` is made of the optimizers' options; their help is tested with them.
        source = inspect.getsource(section) if section is not OptimizerSection else ""
        for field in dataclasses.fields(section):
            missing = dataclasses.MISSING
            assert field.default is not missing or field.default_factory is not missing
            if section is OptimizerSection:
                continue
            after = source.split(f"\n    {field.name}: ", 1)[1].splitlines()[1]
            assert after.strip().startswith('"""'), f"{section.__name__}.{field.name} has no help"


def test_method_has_the_keys_of_loom_config():
    """So a part that the adapter gains can be asked for in RUN.yaml. Left out: what is no choice of a run."""
    from peft import PeftConfig

    from loraloom import LoomConfig

    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    others = {"loom_format_version", "target_parameters", "composition"}
    ours = {f.name for f in dataclasses.fields(LoomConfig)} - inherited - others
    keys = {f.name for f in dataclasses.fields(MethodSection)}
    assert keys - {"name", *SELECTION_KEYS, *EXPANSION_KEYS} == ours


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name != "compare.yaml"], ids=lambda path: path.name)
def test_examples_are_valid(path):
    from trl import SFTConfig

    config = load_config(path, (), "composition" if path.stem == "compose" else None)
    assert config.training.keys() <= {f.name for f in dataclasses.fields(SFTConfig)} | TRAINING_KEYS.keys()


def test_training_keeps_its_defaults_beside_other_keys(tmp_path):
    config = load_config(write(tmp_path, "training: {max_steps: 7}"))
    assert config.training == {**TRAINING_DEFAULTS, "max_steps": 7}


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E-3", 2e-3), ("-1e3", -1e3), ("1.5e-4", 1.5e-4)])
def test_exponents_are_numbers(tmp_path, text, value):
    assert load_config(write(tmp_path, f"training: {{learning_rate: {text}}}")).training["learning_rate"] == value


def test_later_overrides_win_and_keep_strings_strings(tmp_path):
    path = write(tmp_path, "data: {path: rows.jsonl}\nmethod: {r: 4}")
    overrides = [("method.r", "8"), ("method.r", "2"), ("data.path", "123"), ("training.learning_rate", "1e-3")]
    config = load_config(path, [*overrides, ("method.target_modules", "[query, value]")])
    assert (config.method.r, config.data.path, config.training["learning_rate"]) == (2, "123", 1e-3)
    assert config.method.target_modules == ["query", "value"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: {ranc: 4}", ["unknown key method.ranc", "expected one of name, r, lora_alpha"]),
        ("method: {lora_alfa: 4}", ["unknown key method.lora_alfa", "did you mean 'lora_alpha'?"]),
        ("data: {r: 4}", ["unknown key data.r", "belongs to section 'method'"]),
        ("model: {learning_rate: 1e-4}", ["unknown key model.learning_rate", "belongs to section 'training'"]),
        ("learning_rate: 1e-4", ["unknown section 'learning_rate'", "belongs to section 'training'"]),
        ("modle: {name: x}", ["unknown section 'modle'", "did you mean 'model'?"]),
        ("method: {r: eight}", ["method.r: 'eight'", "int"]),
        ("method: {r: true}", ["method.r: True", "int"]),
        ("method: {r: 1.5}", ["method.r: 1.5", "int"]),
        ("method: {name: morelora}", ["method.name: 'morelora'", "'moslora'", "did you mean"]),
        ("method: {target_modules: [1, 2]}", ["method.target_modules: [1, 2]", "str or list[str] or null"]),
        ("method: {rank_pattern: {q_proj: high}}", ["method.rank_pattern", "high"]),
        ("model: {task: causal-llm}", ["model.task", "did you mean 'causal-lm'?"]),
        ("method: 8", ["section 'method' holds 8"]),
        ("- model", ["holds a list"]),
        ("model: {name: [}", ["not valid YAML"]),
        ("method: {r: 4, r: 8}", ["'r' occurs twice"]),
        ("method: {name: full, r: 4}", ["method.r has no meaning", "'full'"]),
        ("method: {name: full}\nmodel: {quantization: nf4}", ["'full' cannot train", "nf4"]),
        ("method: {name: probe}\nmodel: {task: causal-lm, name: x}", ["'probe'", "text-classification"]),
        ("model: {task: causal-lm}", ["'builtin:minilm' is an encoder"]),
        ("method: {keep: 4}", ["method.keep has no meaning", "'lora'", "use 'weightlora'"]),
        ("method: {name: weightlora, expand_times: 1}", ["method.expand_times", "use 'weightlora+'"]),
        ("method: {name: weightlora+, expand_times: 1, expand_parameters: 9}", ["expand_parameters 9 expands once"]),
        ("method: {name: weightlora}\noptimizer: {name: adamw}", ["'adamw' cannot select", "'weight_adam'"]),
        ("method: {name: weightlora}\ntraining: {optim: sgd}", ["'sgd' cannot select", "weight_adam"]),
        (
            "method: {name: weightlora}\ntraining: {load_best_model_at_end: true}",
            ["training.load_best_model_at_end cannot", "set it to false"],
        ),
        ("optimizer: {name: galore}", ["'galore' is for whole weights", "set method.name to 'full'"]),
        ("composition: {members: {a: x}}", ["section 'composition' needs method.name 'composition', not 'lora'"]),
        ("method: {name: composition}", ["composition.members is empty", "its folder"]),
        ("method: {name: composition, r: 4}", ["method.r has no meaning", "'composition'"]),
        ("composition: {member: {a: x}}", ["unknown key composition.member", "did you mean 'members'?"]),
        ("composition: {weights: learnt}", ["composition.weights: 'learnt'", "did you mean 'learned'?"]),
        (
            "method: {name: composition}\ncomposition: {members: {a: x}, weights: uniform, scope: model}",
            ["composition.scope 'model' has no meaning for weights 'uniform'", "remove it"],
        ),
        ("optimizer: {name: adamv}", ["optimizer.name: 'adamv'", "did you mean 'adamw'"]),
        ("optimizer: {learning_rate: 1e-3}", ["unknown key optimizer.learning_rate", "belongs to section 'training'"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas: [0.9] is not two numbers"]),
        ("optimizer: {gate_lr: 2}\ntraining: {optim: sgd}", ["training.optim 'sgd'", "remove one of them"]),
        ("training: {weight_decay: 0.1}", ["training.weight_decay", "use optimizer.weight_decay"]),
        ("training: {adam_beta2: 0.99}", ["training.adam_beta2", "use optimizer.betas"]),
        ("training: {output_dir: x}", ["training.output_dir", "use output.dir"]),
        ("data: {test_fraction: 1.0}", ["data.test_fraction: 1.0"]),
    ],
)
def test_mistakes_are_one_line_with_the_fix(tmp_path, text, expected):
    text = message(tmp_path, text)
    assert all(part in text for part in expected), text


def test_the_method_of_a_verb_is_a_default(tmp_path):
    path = write(tmp_path, "composition: {members: {a: x}, weights: {a: 1}}")
    config = load_config(path, (), "composition")
    assert (config.method.name, config.composition.weights) == ("composition", {"a": 1})
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(write(tmp_path, "method: {name: dora}"), (), "composition").method.name == "dora"


def test_override_mistakes(tmp_path):
    assert "did you mean 'method'" in message(tmp_path, "", ("methd.r", "4"))
    assert "expected --section.key" in message(tmp_path, "", ("method", "lora"))
    assert "did you mean 'lora_alpha'" in message(tmp_path, "", ("method.lora_alfa", "4"))
    assert "method.r: 'four'" in message(tmp_path, "", ("method.r", "four"))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "")
    with pytest.raises(InputError, check=coded("no-file", "RUN.yaml", "RUM.yaml")):
        load_config(tmp_path / "RUM.yaml")
