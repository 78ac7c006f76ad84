"""A report with one figure of every kind, text that must be escaped, and numbers that are missing."""

import dataclasses
import math
import random

from loraloom.report import Bars, Event, Fact, Heatmap, Lines, Point, Report, Scatter, Section, Series, Table
from loraloom.report.html import render_html

HOSTILE = "<script>alert('x')</script> & \"quoted\" ]]> {{ 7 * 7 }}"
LONG_PATH = "/home/someone/" + "a-folder-whose-name-has-no-spaces/" * 5 + "run"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def heatmap(layers=4, *, signed=False, columns=MODULES):
    generator = random.Random(layers)
    values: list[list[float | None]] = [
        [generator.uniform(-1 if signed else 0, 1) for _ in columns] for _ in range(layers)
    ]
    values[0][0] = None
    return Heatmap("layer", "module", [str(i) for i in range(layers)], [*columns], values, "gate", signed=signed)


def full_report():
    steps = [float(i) for i in range(0, 2000, 5)]
    loss = [2.5 * math.exp(-x / 500) + 0.3 for x in steps]
    curves = [Series("train", steps, [*loss]), Series("test", [0, 500, 1000, 1995], [2.6, 2.0, None, 0.5])]
    time = [str(i * 7) for i in range(24)]
    sections = [
        Section(
            "Loss",
            "A note.",
            Lines("step", "loss", curves, references={"baseline": 1.0}, events=[Event("dropped", 700)]),
        ),
        Section("Rates", "", Lines("rate", "loss", [Series("a", [1e-4, 1e-2], [0.1, 10])], log_x=True, log_y=True)),
        Section(
            "Seeds",
            "",
            Lines(
                "step",
                "accuracy",
                [
                    Series(f"method {i}", [0, 100, 1e5], [0.1, 0.5, 0.9 - i / 50], points=[(1e5, 0.8), (1e5, 1.02)])
                    for i in range(3)
                ],
            ),
        ),
        Section(
            "Many",
            "",
            Lines(
                "step",
                "y",
                [Series(f"a long name {i}", [0, 1], [0.1, 0.5 + i / 500]) for i in range(20)],
                events=[Event(f"{i} adapters were dropped", i / 12) for i in range(12)],
            ),
        ),
        Section("Gates", "", heatmap(32)),
        Section("Differences", "", heatmap(6, signed=True, columns=["attention.output.dense", "intermediate.dense"])),
        Section("Gates over time", "", heatmap(36, columns=time)),
        Section("Memory", "", Bars("peak", ["LoRA", HOSTILE, "full"], [1e9, 2e9, None], [1e8, None, None], "bytes")),
        Section(
            "Points",
            "",
            Bars(
                "accuracy",
                ["a", "b", "c"],
                [0.9, 0.91, None],
                [0.01, 0, None],
                from_zero=False,
                samples=[[0.8, 0.95], [0.91], []],
            ),
        ),
        Section("Below zero", "", Bars("difference", ["a", "b"], [-0.5, 0.25])),
        Section(
            "Trade-off", "", Scatter("kept", "gained", [Point(f"λ = {i / 9:.1f}", i, -i * i) for i in range(10)], True)
        ),
        Section(
            "Two sweeps",
            "",
            Scatter(
                "kept",
                "gained",
                [Point(f"{i / 4:.2f}", i, -i * (j + 1), ["scaled", "rewound"][j]) for i in range(5) for j in range(2)],
                True,
            ),
        ),
        Section(
            "Confusion",
            "",
            Heatmap(
                "true",
                "predicted",
                [f"a class {i}" for i in range(14)],
                [f"a class {i}" for i in range(14)],
                [[float((i * j) % 50) for j in range(14)] for i in range(14)],
                "rows",
            ),
        ),
        Section(
            "Folded",
            "",
            table=Table(["key", "value"], [["a", "b"]]),
            folded=Table(["key", "value"], [["c", HOSTILE]], "All keys"),
        ),
        Section(HOSTILE, HOSTILE, table=Table([HOSTILE, "b", "c", "d", "e"], [[LONG_PATH, 1, 0.5, None, HOSTILE]] * 9)),
        Section("Words alone", "No figure and no table."),
    ]
    facts = [
        Fact("accuracy", "0.8853", "0.1277 before"),
        Fact("worst", "2", LONG_PATH),
        *(Fact(f"fact {i}", str(i)) for i in range(3)),
    ]
    facts += [Fact("folder", LONG_PATH), Fact("name", HOSTILE)]
    return Report(f"A run of {HOSTILE}", f"loraloom train '{HOSTILE}'", "It went well.", facts, sections)


def page(report):
    """The report's HTML, as `write_report` has it rendered."""
    stamped = dataclasses.replace(report, created="2026-11-22T05:30:00+00:00", versions={"loraloom": "0.1.0"})
    return render_html(stamped)
