"""A finished training run: curves, what it gained over the baselines, gates, weights, configuration."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loraloom.errors import InputError
from loraloom.report.builders.composition import composition_sections
from loraloom.report.builders.modules import by_layer, finite, labels_of
from loraloom.report.model import Bars, Event, Fact, Heatmap, Lines, Report, Section, Series, Table
from loraloom.text import number

METRICS_FILE, STATE_FILE, CONFIG_FILE, SELECTION_FILE = (
    *("metrics.json", "trainer_state.json", "resolved.yaml", "selection.json"),
)
METHODS = {
    "lora": "LoRA",
    "moslora": "MoSLoRA",
    "dora": "DoRA",
    "weightlora": "WeightLoRA",
    "weightlora+": "WeightLoRA+",
    "full": "Full fine-tuning",
    "probe": "A linear head",
}
NAMES = {"macro_f1": "macro-F1"}
SHARES = ("accuracy", "macro_f1")  # metrics between 0 and 1, which share a picture
MOMENTS = 24  # columns of the gates over time
MODULES = 96  # rows of it


def report_of_run(folder: Path, command: str, baselines: Mapping[str, float] | None = None) -> Report:
    """The report of the run that `loraloom train` left in a folder.

    Args:
        folder: `output.dir` of the run.
        command: what was typed.
        baselines: accuracies to compare with, by name.

    Raises:
        InputError: the folder holds no finished run.
    """
    found = {}
    for name in (METRICS_FILE, STATE_FILE, CONFIG_FILE, SELECTION_FILE):
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            if name == METRICS_FILE:
                raise InputError(f"{folder} holds no finished run: there is no {name}") from None
            continue
        found[name] = yaml.safe_load(text) if name == CONFIG_FILE else json.loads(text)
    return run_report(
        found[METRICS_FILE],
        found.get(STATE_FILE, {}).get("log_history", []),
        found.get(CONFIG_FILE, {}),
        command,
        selection=found.get(SELECTION_FILE),
        baselines=baselines,
    )


def run_report(
    result: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Mapping[str, Any]],
    command: str,
    *,
    selection: Mapping[str, Any] | None = None,
    baselines: Mapping[str, float] | None = None,
) -> Report:
    """The report of a run from what it left.

    Args:
        result: metrics.json.
        log_history: of transformers' trainer_state.json: a dict for each logged step and each evaluation.
        config: resolved.yaml, sections of keys and values.
        command: what was typed.
        selection: selection.json of weightlora.
        baselines: accuracies to compare with, by name.
    """
    baselines = baselines or {}
    sections = [_comparison(result, baselines), _loss(result, log_history, selection)]
    sections += [_metric(result, log_history, names, baselines) for names in _groups(result["after"])]
    sections += _gates(result, selection)
    if result.get("composition"):
        sections += composition_sections(result["composition"]["weights"], result["composition"]["mean"])
    sections += [_configuration(config)]
    data, model = config.get("data", {}).get("path"), config.get("model", {}).get("name")
    method = METHODS.get(result["method"], result["method"])
    return Report(
        title=f"{method} on {Path(str(data)).name}" if data else method,
        command=command,
        lead=_lead(result, baselines),
        summary=_summary(result, model, data),
        sections=[section for section in sections if section.figure or section.table],
    )


def _lead(result: Mapping[str, Any], baselines: Mapping[str, float]) -> str:
    name = _main_metric(result)
    before, after = result["before"][name], result["after"][name]
    lead = f"Test {_named(name)} went from {_text(before)} to {_text(after)} in {result['steps']} steps"
    if baselines and name == "accuracy":
        others = " and ".join(f"{label} {value:.4f}" for label, value in baselines.items())
        return f"{lead}; to compare: {others}."
    return f"{lead}."


def _summary(result: Mapping[str, Any], model: str | None, data: str | None) -> list[Fact]:
    name = _main_metric(result)
    after, before = _text(result["after"][name]), _text(result["before"][name])
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    speed = f"{result['tokens_per_second']:,.0f} tokens/s in training"
    facts = [
        Fact(f"test {_named(name)}", after, f"{before} before training"),
        Fact("trainable parameters", f"{trainable:,}", f"{trainable / total:.2%} of {total:,}"),
        Fact("peak memory", number(result["peak_memory_bytes"], "bytes")),
        Fact("wall time", f"{result['wall_time_seconds']:.0f} s", speed),
        *([Fact("base model", str(model))] if model else []),
        *([Fact("data", str(data))] if data else []),
        Fact("rows", f"{result['train_rows']:,} to train on, {result['test_rows']:,} to test on"),
    ]
    if result.get("adapters"):
        kept = sum(adapter is not None for adapter in result["adapters"].values())
        facts.append(Fact("adapters kept", f"{kept} of {len(result['adapters'])}"))
    return [*facts, Fact("folder", str(result["output_dir"]))]


def _comparison(result: Mapping[str, Any], baselines: Mapping[str, float]) -> Section:
    if not baselines or "accuracy" not in result["after"]:
        return Section("What it gains")
    method = METHODS.get(result["method"], result["method"])
    rows = {**baselines, method: result["after"]["accuracy"]}
    note = f"Accuracy on the same {result['test_rows']:,} test rows; one of them is {1 / result['test_rows']:.4f}."
    return Section("What it gains", note, Bars("accuracy", [*rows], [*rows.values()]))


def _loss(
    result: Mapping[str, Any], history: Sequence[Mapping[str, Any]], selection: Mapping[str, Any] | None
) -> Section:
    train = [(entry["step"], finite(float(entry["loss"]))) for entry in history if "loss" in entry]
    series = [("train", train), (_evaluated(result), _evaluations(result, history, "loss"))]
    curves = [Series(name, [x for x, _ in points], [y for _, y in points]) for name, points in series if points]
    where = _evaluated(result)
    note = f"In training the mean over the steps since the point before, on the {where} set at each evaluation."
    return Section("Loss", note, Lines("step", "loss", curves, events=_events(selection)))


def _metric(
    result: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    baselines: Mapping[str, float],
) -> Section:
    series = []
    for name in names:
        points = _evaluations(result, history, name)
        series.append(Series(_named(name), [x for x, _ in points], [y for _, y in points]))
    title = " and ".join(_named(name) for name in names)
    references = dict(baselines) if "accuracy" in names else {}
    label = f"on the {_evaluated(result)} set" if names[0] in SHARES else _named(names[0])
    note = f"On the {_evaluated(result)} set, at each evaluation." + (
        " Dotted: accuracies to compare with." if references else ""
    )
    return Section(title[0].upper() + title[1:], note, Lines("step", label, series, references=references))


def _evaluations(
    result: Mapping[str, Any], history: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[float, float | None]]:
    """(step, metric) at each evaluation of the validation set; without one, of the test set before and after."""
    if result.get("validation_rows"):
        return [(entry["step"], finite(entry[f"eval_{name}"])) for entry in history if f"eval_{name}" in entry]
    points = {0: finite(result["before"][name])}
    points |= {entry["step"]: finite(entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry}
    points[result["steps"]] = finite(result["after"][name])
    return [*points.items()]


def _evaluated(result: Mapping[str, Any]) -> str:
    """The set that is evaluated while training."""
    return "validation" if result.get("validation_rows") else "test"


def _gates(result: Mapping[str, Any], selection: Mapping[str, Any] | None) -> list[Section]:
    sections = []
    if result.get("adapters"):
        last = {name: 0.0 if one is None else one["gate"] for name, one in result["adapters"].items()}
        ranks = {name: 0.0 if one is None else float(one["r"]) for name, one in result["adapters"].items()}
        note = "Last value of each adapter's gate; 0 where the adapter was disconnected."
        sections.append(Section("Gates", note, by_layer(last, "gate", **_range(last.values()))))
        if len({*ranks.values()} - {0.0}) > 1:
            sections.append(Section("Ranks", "0 where the adapter was disconnected.", by_layer(ranks, "rank")))
    if selection and selection["history"]:
        sections.append(_gates_over_time(selection))
    return sections


def _gates_over_time(selection: Mapping[str, Any]) -> Section:
    history = selection["history"]
    chosen = sorted({round(i * (len(history) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)})
    moments = [history[i] for i in chosen]
    labels = labels_of(dict.fromkeys(selection["modules"]))
    # A gate that is gone was disconnected and stays so: nothing of the adapter is left.
    rows = {label: [m["gates"][i] or 0.0 for m in moments] for i, label in enumerate(labels)}
    note = "From the first step to the last one that still had gates; 0 from where an adapter was dropped."
    if len(rows) > MODULES:
        rows = dict(sorted(rows.items(), key=lambda item: -abs(item[1][-1]))[:MODULES])
        note += f" The {MODULES} adapters with the largest last gate, of {len(labels)}."
    span = _range(value for row in rows.values() for value in row)
    steps = [str(moment["step"]) for moment in moments]
    return Section(
        "Gates over time", note, Heatmap("adapter", "step", [*rows], steps, [*rows.values()], "gate", **span)
    )


def _events(selection: Mapping[str, Any] | None) -> list[Event]:
    """The moments of a selection: how many adapters were dropped and how many were widened."""
    happened: dict[int, list[str]] = {}
    for event in selection["events"] if selection else []:
        disconnects = event["event"] == "disconnect"
        text = f"{len(event['modules'])} dropped" if disconnects else f"{len(event['ranks'])} widened"
        happened.setdefault(event["step"], []).append(text)
    return [Event(", ".join(texts), step) for step, texts in happened.items()]


def _range(gates: Iterable[float]) -> dict[str, Any]:
    """Colours on both sides of zero only if a gate is below it by more than a trace; else they begin at zero."""
    gates = [*gates]
    return {"signed": True} if -min(gates) > 0.05 * max(map(abs, gates)) else {"low": 0.0}


def _configuration(config: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = [[f"{section}.{key}", _setting(value)] for section, keys in config.items() for key, value in keys.items()]
    table = Table(["key", "value"], [[*row] for row in rows]) if rows else None
    return Section("Configuration", "Every key of the run, as resolved.yaml has it.", table=table)


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _groups(metrics: Mapping[str, float]) -> list[list[str]]:
    """Metrics other than the loss, those that share a scale together."""
    shares = [name for name in metrics if name in SHARES]
    return [*([shares] if shares else []), *([name] for name in metrics if name != "loss" and name not in SHARES)]


def _main_metric(result: Mapping[str, Any]) -> str:
    return next((name for name in result["after"] if name != "loss"), "loss")


def _named(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _text(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
