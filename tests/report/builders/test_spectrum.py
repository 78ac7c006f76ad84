"""Intruders by layer, and sweeps: retention against the task, no number twice."""

import pytest

from loraloom.intruders.find import LayerIntruders
from loraloom.intruders.report import IntruderReport, SweepPoint
from loraloom.report import Lines, Scatter
from loraloom.report.builders import intruder_report, trade_off_section

from .support import sections

MODULES = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1, 10) for m in ("q", "v")]


def layer(name, **changes):
    known = {"intruders": [], "cosines": [0.9, 0.8], "exact": True, "relative_norm": 0.02, "effective_rank": 3.5}
    fields = {"shape": (8, 8), "rank": 4, "singular_values": [2.0, 1.0], "stable_rank": 2.0, "vectors": None}
    return LayerIntruders(name=name, **{**known, **fields, **changes})


def found_in(layers, **changes):
    return IntruderReport("runs/an-adapter", 10, 0.5, layers, **changes)


@pytest.mark.parametrize("found", [0, 2])
def test_intruders(found):
    layers = [layer(name) for name in MODULES]
    cosines = [0.2, 0.4] if found else [0.9]
    layers[3] = layer(MODULES[3], intruders=[0, 1][:found], cosines=cosines, relative_norm=None)
    report = intruder_report(found_in(layers), "c")
    shown = sections(report)
    assert report.title == "Intruder dimensions of an-adapter"
    counts = shown["Intruder dimensions"].figure
    assert sum(value for row in counts.values for value in row) == found
    assert counts.values[1][1] == found
    assert len(shown["Intruder dimensions"].table.rows) == len(MODULES)
    assert shown["Size of the update"].figure.values[1][1] is None
    assert not {"Mitigation trade-off", "Lost to the rank"} & shown.keys()
    assert "bound" not in shown["Lowest cosine"].note
    assert report.lead.startswith("2 intruder dimensions in 1 of 6" if found else "No intruder dimension in 6")


def test_bounds_are_called_bounds_and_errors_are_shown():
    layers = [layer(MODULES[0], exact=False), layer(MODULES[1])]
    errors = {MODULES[0]: 0.1, MODULES[1]: 0.2}
    shown = sections(intruder_report(found_in(layers, errors=errors), "c"))
    assert "upper bounds" in shown["Lowest cosine"].note
    assert shown["Lost to the rank"].figure.values == [[0.1, 0.2]]
    assert [row[-1] for row in shown["Intruder dimensions"].table.rows] == [0.1, 0.2]


def sweep(metrics, error=0.0):
    return [SweepPoint(scale, {name: of(scale) for name, of in metrics.items()}, error) for scale in (1.0, 0.5, 0.0)]


def test_retention_is_drawn_against_the_task():
    """Each set also has a loss, and a macro-F1: the first metric of the task is paired with the same of retention."""
    points = sweep({"accuracy": lambda s: 0.8 * s, "loss": lambda s: s, "retention_accuracy": lambda s: 1 - s})
    section = sections(intruder_report(found_in([layer(MODULES[0])]), "c", sweep=points))["Mitigation trade-off"]
    assert isinstance(section.figure, Scatter)
    assert (section.figure.x_label, section.figure.y_label) == ("accuracy, retention set", "accuracy, task")
    drawn = [(point.label, point.x, point.y) for point in section.figure.points]
    assert drawn == [("λ = 1", 0.0, 0.8), ("λ = 0.5", 0.5, 0.4), ("λ = 0", 1.0, 0.0)]
    assert section.table.columns == ["scale λ", "accuracy, task", "loss, task", "accuracy, retention set"]
    assert section.table.rows[1] == [0.5, 0.4, 0.5, 0.5]


def test_rewinding_is_a_second_curve_from_the_same_point():
    points = sweep({"accuracy": lambda s: 0.8 * s, "retention_accuracy": lambda s: 1 - s})
    points += [SweepPoint(0.5, {"accuracy": 0.1, "retention_accuracy": 0.9}, 0.0, rewound=True)]
    section = trade_off_section(points)
    drawn = [(point.group, point.x, point.y) for point in section.figure.points]
    one, two = dict.fromkeys(group for group, _, _ in drawn)
    assert drawn == [(one, 0.0, 0.8), (one, 0.5, 0.4), (one, 1.0, 0.0), (two, 0.0, 0.8), (two, 0.9, 0.1)]
    assert [row[1:] for row in section.table.rows] == [
        [1.0, 0.8, 0.0],
        [0.5, 0.4, 0.5],
        [0.0, 0.0, 1.0],
        [0.5, 0.1, 0.9],
    ]


def test_loss_and_perplexity_are_one_number():
    section = trade_off_section(sweep({"loss": lambda s: s, "perplexity": lambda s: 402.4034}))
    assert isinstance(section.figure, Lines)
    assert [curve.name for curve in section.figure.series] == ["loss, task"]
    assert section.table.columns == ["scale λ", "loss, task"]


@pytest.mark.parametrize("metrics", [{}, {"accuracy": lambda s: 0.5}])
def test_a_sweep_with_fewer_metrics_is_drawn_over_the_scale(metrics):
    section = trade_off_section(sweep(metrics, error=0.25))
    (curve,) = section.figure.series
    name, values = ("accuracy, task", [0.5] * 3) if metrics else ("lost to the rank", [0.25] * 3)
    assert (curve.name, curve.y) == (name, values)


def test_what_the_files_tell_is_drawn_where_nothing_else_was_measured():
    files = {"relative_change": lambda s: 1 - s, "remaining_intruders": lambda s: int(4 * s)}
    section = trade_off_section(sweep(files))
    assert (section.figure.x_label, section.figure.y_label) == ("intruders left", "relative change of ΔW")
    assert len(section.figure.points) == 3
    measured = trade_off_section(sweep({"accuracy": lambda s: s, **files}))
    assert measured.table.columns == ["scale λ", "accuracy, task", "relative change of ΔW", "intruders left"]
    assert [curve.name for curve in measured.figure.series] == ["accuracy, task"]
