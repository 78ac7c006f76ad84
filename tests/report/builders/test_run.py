"""The report of a real run on a pico model, and of what other runs would have left."""

import dataclasses
import json
from pathlib import Path

import pytest

from loraloom.errors import InputError
from loraloom.report import Bars, Heatmap, Lines
from loraloom.report.builders import report_of_run, run_report
from loraloom.selection.log import SelectionLog
from loraloom.training import fit
from loraloom.training.composition import Composed
from loraloom.training.config import DataSection, MethodSection, ModelSection, OutputSection, RunConfig
from loraloom.training.result import RunResult

from .support import sections

GATES = ["encoder.layer.0.attention.query", "encoder.layer.0.attention.key", "pooler.dense"]


def result(**changes):
    known = {
        "task": "text-classification",
        "method": "weightlora",
        "before": {"loss": 2.0, "accuracy": 0.25, "macro_f1": 0.2},
        "after": {"loss": 0.5, "accuracy": 0.75, "macro_f1": 0.7},
        "label_names": ["red", "blue"],
        "train_rows": 100,
        "test_rows": 20,
        "steps": 40,
        "trainable_parameters": 1000,
        "total_parameters": 100_000,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": None,
        "wall_time_seconds": 12.3,
        "output_dir": "somewhere",
        "adapters": {GATES[0]: {"r": 4, "gate": 1.5}, GATES[1]: None, GATES[2]: {"r": 8, "gate": 0.5}},
        "validation_rows": 10,
    }
    return RunResult(**{**known, **changes})


DATA = {"classes": {"red": 60, "blue": 40}, "majority_share": 0.6, "cut_share": 0.25, "longest": 90, "max_length": 64}
HISTORY = [
    {"step": 10, "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 1000.0},
    {"step": 10, "gates/encoder.layer.0.attention.query": 1.0},
    {"step": 20, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_macro_f1": 0.4},
    {"step": 20, "loss": 1.0, "learning_rate": 5e-4, "grad_norm": 0.5},
    {"step": 40, "eval_loss": 0.5, "eval_accuracy": 0.75, "eval_macro_f1": 0.7},
    {"step": 40, "train_runtime": 3.0, "train_loss": 1.2},
]
SELECTION = SelectionLog(
    GATES,
    [{"step": s, "gates": [1.0, None if s > 5 else 0.9, -0.01]} for s in range(1, 60)],
    [
        {"step": 5, "event": "disconnect", "modules": [GATES[1]]},
        {"step": 5, "event": "expand", "ranks": {GATES[2]: 8}},
        {"step": 9, "event": "disconnect", "modules": []},
    ],
)


def figures(report):
    return {section.title: section.figure for section in report.sections}


def test_curves_start_before_training_and_end_with_the_result():
    report = run_report(result(), RunConfig(), "loraloom train", HISTORY, selection=SELECTION)
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    drawn = figures(report)
    train, validation, test = drawn["Loss"].series
    assert (train.x, train.y) == ([10, 20], [1.5, 1.0])
    assert (validation.name, validation.x, validation.y) == ("validation", [20, 40], [1.0, 0.5])
    assert (test.name, test.x, test.points) == ("test", [], [(0, 2.0), (40, 0.5)])
    names = [series.name for series in drawn["Accuracy and macro-F1"].series]
    assert names == ["accuracy, validation", "accuracy, test", "macro-F1, validation", "macro-F1, test"]
    assert drawn["Learning rate"].series[0].y == [1e-3, 5e-4]
    assert drawn["Gradient norm"].log_y
    assert [(event.label, event.x) for event in drawn["Loss"].events] == [("1 dropped, 1 widened", 5), ("0 dropped", 9)]


def test_gates_by_layer_and_over_time():
    drawn = figures(run_report(result(), RunConfig(), "c", HISTORY, selection=SELECTION))
    gates = drawn["Gates"]
    assert (gates.rows, gates.columns) == (["0", "-"], ["query", "key", "dense"])
    assert gates.values == [[1.5, 0.0, None], [None, None, 0.5]]
    assert drawn["Ranks"].values == [[4.0, 0.0, None], [None, None, 8.0]]
    over_time = drawn["Gates over time"]
    assert over_time.rows == ["0 query", "0 key", "dense"]
    assert over_time.columns[0] == "1"
    assert over_time.columns[-1] == "59"
    assert len(over_time.columns) <= 24
    assert over_time.values[1][0] == 0.9
    assert over_time.values[1][-1] == 0.0
    assert not over_time.signed  # a trace below zero is not worth half of the colors
    negative = dataclasses.replace(SELECTION, history=[{"step": 1, "gates": [1.0, -1.0, 0.0]}])
    assert figures(run_report(result(), RunConfig(), "c", [], selection=negative))["Gates over time"].signed


def test_baselines_are_compared_with():
    report = run_report(result(), RunConfig(), "c", HISTORY, baselines={"linear probe": 0.6})
    drawn = figures(report)
    assert drawn["What it gains"] == Bars("accuracy", ["linear probe", "WeightLoRA"], [0.6, 0.75], whole=1.0)
    assert drawn["Accuracy and macro-F1"].references == {"linear probe": 0.6}
    assert "linear probe 0.6" in report.lead
    assert "What it gains" not in figures(run_report(result(), RunConfig(), "c", HISTORY))


def test_a_language_model_has_a_perplexity_which_may_overflow():
    metrics = {"before": {"loss": 800.0, "perplexity": float("inf")}, "after": {"loss": 2.0, "perplexity": 7.4}}
    report = run_report(result(task="causal-lm", adapters=None, **metrics), RunConfig(), "c", [])
    assert "Perplexity" not in figures(report)  # it is the loss once more
    assert [series.name for series in figures(report)["Loss"].series] == ["test"]  # nothing was logged in training
    assert "perplexity" in report.lead
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_what_it_confuses_and_where_it_is_wrong():
    example = {"text": "a text\nof two lines", "row": 3, "label": "red", "answer": "blue", "probability": 0.9}
    found = result(
        confusion=[[8, 2], [1, 9]], examples=[example], data=DATA, warnings=["the model answers 'red' to all"]
    )
    report = run_report(found, RunConfig(), "c")
    shown = sections(report)
    matrix = shown["Which classes it confuses"].figure
    assert (matrix.rows, matrix.columns, matrix.values) == (["red", "blue"], ["red", "blue"], [[8, 2], [1, 9]])
    assert shown["Mistakes"].table.rows == [["a text of two lines", "red", "blue", 0.9]]
    assert (shown["Classes"].figure.labels, shown["Classes"].figure.values) == (["red", "blue"], [60, 40])
    assert "right on 60.0% of the test rows" in shown["Classes"].note
    assert shown["What it gains"].figure.labels == ["majority class", "WeightLoRA"]
    assert report.lead.endswith("The model answers 'red' to all.")
    assert ("cut", "25.0% of the texts") in [(fact.label, fact.value) for fact in report.summary]


def test_many_classes_are_listed_by_what_is_confused_most():
    names = [f"class {i}" for i in range(40)]
    matrix = [[0] * 40 for _ in names]
    matrix[3][7], matrix[5][5], matrix[1][2] = 4, 100, 6
    shown = sections(run_report(result(label_names=names, confusion=matrix), RunConfig(), "c"))
    section = shown["Which classes it confuses"]
    assert section.figure is None
    assert section.table.rows == [["class 1", "class 2", 6], ["class 3", "class 7", 4]]


def test_what_it_writes_before_and_after():
    example = {"prompt": "A", "expected": "B", "before": "C " * 300, "after": "D"}
    metrics = {"before": {"loss": 3.0, "perplexity": 402.4034}, "after": {"loss": 2.0, "perplexity": 7.4}}
    found = result(task="causal-lm", examples=[example], **metrics)
    report = run_report(found, RunConfig(), "c")
    (row,) = sections(report)["What it writes"].table.rows
    assert (row[0], row[1], row[3]) == ("A", "B", "D")
    assert row[2].endswith("…")
    assert "402.4 before" in report.lead  # four digits are enough


def test_weights_of_a_composition():
    weights = {"layer.0.q": {"a": 0.25, "b": 0.75}, "layer.1.q": {"a": 1.0}}
    composition = Composed(weights, {"a": 0.625, "b": 0.75}, "portable", 8)
    drawn = figures(run_report(result(composition=composition), RunConfig(), "c", HISTORY))
    assert drawn["Mean weights"].values == [0.625, 0.75]
    heatmap = drawn["Weights by module"]
    assert (heatmap.rows, heatmap.columns) == (["0 q", "1 q"], ["a", "b"])
    assert heatmap.values == [[0.25, 0.75], [1.0, None]]


def test_a_run_of_hundreds_of_adapters_stays_small():
    modules = [f"model.layers.{i}.{m}_proj" for i in range(80) for m in ("q", "k", "v", "o", "gate", "up", "down")]
    history = [{"step": s, "gates": [s * i / 1e4 for i in range(len(modules))]} for s in range(200)]
    adapters = {name: {"r": 4, "gate": 1.0} for name in modules}
    selection = SelectionLog(modules, history, [])
    report = run_report(result(adapters=adapters), RunConfig(), "c", HISTORY, selection=selection)
    section = next(section for section in report.sections if section.title == "Gates over time")
    assert isinstance(section.figure, Heatmap)
    assert len(section.figure.rows) == 96
    assert section.figure.rows[0] == "79 down_proj"
    assert "The 96 adapters with the largest last gate, of 560" in section.note


def test_the_folder_of_a_real_run(pico_bert_dir, tmp_path):
    rows = [{"text": f"{c} {w}", "label": c} for c in ("red", "blue") for w in ("dog", "cat", "apple", "file") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(path=str(tmp_path / "rows.jsonl"), test_path=str(tmp_path / "rows.jsonl"))
    config = RunConfig(
        model=ModelSection(name=str(pico_bert_dir)),
        data=data,
        method=MethodSection(name="weightlora", r=2, select_until=6, warmup_steps=2),
        output=OutputSection(dir=str(tmp_path / "run")),
    )
    config = dataclasses.replace(
        config, training={**config.training, "max_steps": 8, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    )
    fit.train(config)
    report = report_of_run(tmp_path / "run", "loraloom train RUN.yaml")
    assert report.title == "WeightLoRA on rows.jsonl"
    drawn = figures(report)
    assert isinstance(drawn["Loss"], Lines)
    assert drawn["Loss"].series[0].x == [*range(1, 9)]
    assert [event.x for event in drawn["Loss"].events] == [6]
    assert {"Gates", "Gates over time", "Accuracy and macro-F1"} <= drawn.keys()
    table = next(section.table for section in report.sections if section.title == "Configuration")
    assert ["method.select_until", "6", "not set"] in table.rows
    assert not any(row[0] == "method.lora_dropout" for row in table.rows)
    folded = next(section.folded for section in report.sections if section.title == "Configuration")
    assert ["method.lora_dropout", "0.0"] in folded.rows


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError) as raised:
        report_of_run(Path(tmp_path), "c")
    assert raised.value.code == "no-run"
