"""COMPARE.yaml: what its keys mean, and that a mistake anywhere in it is one line, before anything runs."""

from pathlib import Path

import pytest
import yaml

from loraloom.errors import InputError
from loraloom.training.compare.config import Range, configure, load_plan
from loraloom.training.compare.runs import make_run

EXAMPLE = Path(__file__).parents[3] / "examples" / "compare.yaml"


def write(tmp_path, text):
    path = tmp_path / "COMPARE.yaml"
    path.write_text(text)
    return path


def plan_of(tmp_path, compare, sections=""):
    return load_plan(write(tmp_path, f"{sections}\ncompare: {compare}"))


def test_the_example_is_a_plan_of_18_runs():
    plan = load_plan(EXAMPLE)
    assert [entry.label for entry in plan.entries] == ["lora", "moslora", "lora+"]
    assert len(plan.entries) * len(plan.seeds) * len(plan.entries[0].learning_rates) == 18
    assert (plan.baseline, plan.metric) == ("lora", "accuracy")
    config = configure(plan.entries[2], {"training.learning_rate": 1e-3}, seed=7)
    assert (config.method.name, config.method.r, config.optimizer.lora_plus_ratio) == ("lora", 8, 4)
    assert (config.training["learning_rate"], config.training["seed"]) == (1e-3, 7)
    assert config.data.path == yaml.safe_load(EXAMPLE.read_text())["data"]["path"]


def test_a_list_of_names_is_enough(tmp_path):
    plan = plan_of(tmp_path, "{methods: [lora, dora]}", "training: {learning_rate: 1e-3, max_steps: 5}")
    assert [configure(entry, {}, 0).method.name for entry in plan.entries] == ["lora", "dora"]
    assert plan.baseline == "lora"
    assert plan.seeds == [0, 1, 2]
    assert [entry.learning_rates for entry in plan.entries] == [[1e-3], [1e-3]]
    assert str(plan.folder) == "loraloom-comparison"


def test_a_label_is_a_method_unless_the_method_is_named(tmp_path):
    plan = plan_of(
        tmp_path, "{methods: {dora: {}, big: {method: {r: 64}}, lora: {method: {name: moslora}}}}", "method: {r: 4}"
    )
    methods = [configure(entry, {}, 0).method for entry in plan.entries]
    assert [(method.name, method.r) for method in methods] == [("dora", 4), ("lora", 64), ("moslora", 4)]


def test_methods_without_adapter_take_no_rank_from_the_others(tmp_path):
    plan = plan_of(tmp_path, "{methods: {lora: {}, full: {learning_rates: [1e-5]}, probe: }}", "method: {r: 4}")
    assert [configure(entry, {}, 0).method.name for entry in plan.entries] == ["lora", "full", "probe"]
    assert plan.entries[1].learning_rates == [1e-5]


def test_causal_models_are_compared_by_loss(tmp_path):
    plan = plan_of(tmp_path, "{methods: [lora]}", "model: {name: x, task: causal-lm}")
    assert (plan.metric, plan.lower_is_better) == ("loss", True)
    plan = plan_of(tmp_path, "{methods: [lora], metric: perplexity}", "model: {name: x, task: causal-lm}")
    assert (plan.metric, plan.lower_is_better) == ("perplexity", True)
    assert not plan_of(tmp_path, "{methods: [lora], metric: macro_f1}").lower_is_better


def test_no_checkpoints_unless_they_are_asked_for(tmp_path):
    def strategy(training):
        plan = plan_of(tmp_path, "{methods: [lora]}", f"training: {training}")
        return configure(plan.entries[0], {}, 0).training["save_strategy"]

    assert strategy("{}") == "no"
    assert strategy("{save_strategy: steps}") == "steps"
    assert strategy("{load_best_model_at_end: true}") == "epoch"


def test_overrides_win_in_every_section(tmp_path):
    path = write(tmp_path, "method: {r: 4}\ncompare: {methods: [lora], seeds: [5]}")
    plan = load_plan(path, [("compare.seeds", "[1, 2]"), ("method.r", "8"), ("output.dir", "there")])
    assert plan.seeds == [1, 2]
    assert configure(plan.entries[0], {}, 0).method.r == 8
    assert str(plan.folder) == "there"


def test_a_search_space(tmp_path):
    space = "{trials: 5, learning_rate: {low: 1e-5, high: 1e-2, log: true}, method.r: {low: 2, high: 8, step: 2}, "
    plan = plan_of(tmp_path, f"{{methods: [lora], search: {space}optimizer.lora_plus_ratio: [1, 16]}}}}")
    assert plan.search.trials == 5
    assert plan.search.space == {
        "training.learning_rate": Range(1e-5, 1e-2, log=True),
        "method.r": Range(2, 8, step=2),
        "optimizer.lora_plus_ratio": [1, 16],
    }


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        ("{}", "compare.methods is missing"),
        ("{methods: [lora], seed: [0]}", "unknown key compare.seed; did you mean 'seeds'?"),
        ("{methods: [lora], learning_rate: 1}", "unknown key compare.learning_rate; did you mean 'learning_rates'?"),
        ("{methods: [morelora]}", "'morelora' is none of lora, moslora"),
        ("{methods: lora}", "compare.methods: 'lora' is not list[str] or dict"),
        ("{methods: {a: {method: {ranc: 4}}}}", "compare.methods.a: unknown key method.ranc"),
        ("{methods: {a: {r: 4}}}", "unknown key compare.methods.a.r; it belongs to section 'method'"),
        ("{methods: {a: {methd: {r: 4}}}}", "unknown key compare.methods.a.methd; did you mean 'method'?"),
        ("{methods: {a: {method: 4}}}", "compare.methods.a: section 'method' holds 4"),
        ("{methods: {a: {data: {path: x}}}}", "data is the same for all methods"),
        ("{methods: {a: {model: {task: causal-lm}}}}", "model.task is the same for all methods"),
        ("{methods: {a: {training: {seed: 4}}}}", "use compare.seeds"),
        ("{methods: {a: {training: {learning_rate: 4}}}}", "use compare.methods.a.learning_rates"),
        ("{methods: {lora: {}, plain: {}}}", "'lora' and 'plain' are the same run"),
        ("{methods: {lora: {method: {keep: 3}}}}", "compare.methods.lora: method.keep has no meaning"),
        ("{methods: [lora], baseline: dora}", "compare.baseline: 'dora' is none of lora"),
        ("{methods: [lora], metric: perplexity}", "compare.metric: 'perplexity' is none of loss, accuracy, macro_f1"),
        ("{methods: [lora], seeds: []}", "compare.seeds: [] is not a list of one or more numbers"),
        ("{methods: [lora], seeds: [1, 1]}", "compare.seeds: [1, 1] has a value twice"),
        ("{methods: [lora], seeds: [0.5]}", "compare.seeds: [0.5] is not list[int]"),
        ("{methods: [lora], learning_rates: [high]}", "compare.learning_rates: ['high'] is not"),
        ("{methods: {lora: {learning_rates: 1e-3}}}", "compare.methods.lora.learning_rates: 0.001 is not a list"),
        ("{methods: [lora], search: {learning_rate: [1, 2]}, learning_rates: [1]}", "exclude each other"),
        ("{methods: {lora: {learning_rates: [1]}}, search: {learning_rate: [1, 2]}}", "exclude each other"),
        ("{methods: [lora], search: {trials: 3}}", "no key to vary"),
        ("{methods: [lora], search: {trials: 0, learning_rate: [1]}}", "compare.search.trials: 0"),
        ("{methods: [lora], search: {r: [1, 2]}}", "compare.search.r: expected section.key with a section of"),
        ("{methods: [lora], search: {data.path: [a]}}", "compare.search.data.path: expected section.key"),
        ("{methods: [lora], search: {method.name: [dora]}}", "compare.search.method.name: expected section.key"),
        ("{methods: [lora], search: {method.r: 4}}", "4 is neither {low: ..., high: ...} nor a list of choices"),
        ("{methods: [lora], search: {method.r: [[1]]}}", "choice [1] is not a word, a number"),
        ("{methods: [lora], search: {method.r: {low: 1, hihg: 2}}}", "is neither {low: ..., high: ...}"),
        ("{methods: [lora], search: {method.r: {low: 1, high: 2, setp: 1}}}", "did you mean 'step'?"),
        ("{methods: [lora], search: {method.r: {low: 1, high: 2, log: yes please}}}", "'yes please' is not bool"),
        ("{methods: [lora], search: {method.r: {low: 2, high: 1}}}", "needs low < high"),
        ("{methods: [lora], search: {learning_rate: {low: 0, high: 1, log: true}}}", "low > 0 with log"),
        ("{methods: [lora], search: {method.r: {low: 1, high: 9, log: true, step: 2}}}", "log and step exclude"),
        ("{methods: [lora], search: {method.rr: [1, 2]}}", "compare.methods.lora: unknown key method.rr"),
    ],
)
def test_mistakes_are_one_line(tmp_path, compare, expected):
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, compare)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: {r: 4}", "compare.methods is missing"),
        ("comapre: {methods: [lora]}", "unknown section 'comapre'; did you mean 'compare'?"),
        ("output: {overwrite: true}\ncompare: {methods: [lora]}", "output.overwrite has no meaning for a comparison"),
        ("method: {ranc: 4}\ncompare: {methods: [lora]}", "unknown key method.ranc"),
    ],
)
def test_mistakes_in_the_file_itself(tmp_path, text, expected):
    with pytest.raises(InputError) as caught:
        load_plan(write(tmp_path, text))
    assert expected in str(caught.value)


def test_a_run_is_named_by_all_that_it_depends_on(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")

    def folder(learning_rate=1e-3, seed=0, label="lora", r=4, output="there"):
        text = f"data: {{path: {rows}}}\nmethod: {{r: {r}}}\noutput: {{dir: {output}}}\n"
        plan = load_plan(write(tmp_path, f"{text}compare: {{methods: {{{label}: {{method: {{name: lora}}}}}}}}"))
        return make_run(plan, plan.entries[0], {"training.learning_rate": learning_rate}, seed).folder

    first = folder()
    assert str(first.parent) == "there/runs"
    assert first.name.startswith("lora-lr0.001-seed0-")
    assert folder() == first
    assert folder(label="another") == first  # a label is only a name
    assert folder(output="elsewhere").name == first.name
    others = {folder(learning_rate=2e-3), folder(seed=1), folder(r=8)}
    rows.write_text("{} ")
    others.add(folder())  # other data
    assert len(others | {first}) == 5
