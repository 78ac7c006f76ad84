"""A finished training run: curves, what it gained over the baselines, mistakes, gates, weights, configuration."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.report.builders.answers import answer_sections
from loraloom.report.builders.composition import composition_sections
from loraloom.report.builders.configuration import configuration_section
from loraloom.report.builders.modules import by_layer, finite, labels_of, metric_name
from loraloom.report.model import Bars, Event, Fact, Heatmap, Lines, Report, Section, Series
from loraloom.text import number

if TYPE_CHECKING:
    from loraloom.selection.log import SelectionLog
    from loraloom.training.config import RunConfig
    from loraloom.training.result import RunResult

METHODS = {
    "lora": "LoRA",
    "moslora": "MoSLoRA",
    "dora": "DoRA",
    "weightlora": "WeightLoRA",
    "weightlora+": "WeightLoRA+",
    "composition": "A composition",
    "full": "Full fine-tuning",
    "probe": "A linear head",
}
SHARES = ("accuracy", "macro_f1", "micro_f1", "f1", "precision", "recall")  # between 0 and 1; they share a picture
MOMENTS = 24  # columns of the gates over time
MODULES = 96  # rows of it
DECADES = 100  # largest over smallest gradient norm from which its axis is logarithmic


def report_of_run(folder: Path, command: str, baselines: Mapping[str, float] | None = None) -> Report:
    """The report of the run that `loraloom train` left in a folder.

    Args:
        folder: `output.dir` of the run.
        command: what was typed.
        baselines: accuracies to compare with, by name.

    Raises:
        InputError: the folder holds no finished run.
    """
    from loraloom.selection.log import read_selection
    from loraloom.training.load import load_config
    from loraloom.training.result import RESOLVED, STATE, load_result

    result = load_result(folder)
    state = folder / STATE
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    config = load_config(folder / RESOLVED)
    return run_report(result, config, command, history, selection=read_selection(folder), baselines=baselines)


def run_report(
    result: "RunResult",
    config: "RunConfig",
    command: str,
    log_history: Sequence[Mapping[str, Any]] = (),
    *,
    selection: "SelectionLog | None" = None,
    baselines: Mapping[str, float] | None = None,
) -> Report:
    """The report of a training run.

    Args:
        result: what it reached.
        config: what it was told.
        command: what was typed.
        log_history: everything that the trainer logged, as transformers' TrainerState has it.
        selection: what became of the adapters of a weightlora run.
        baselines: accuracies to compare with, by name; that of the majority class comes from the result.
    """
    baselines = dict(baselines or {})
    if result.data and result.data["majority_share"] is not None:
        baselines.setdefault("majority class", result.data["majority_share"])
    sections = [_comparison(result, baselines), _loss(result, log_history, selection)]
    sections += [_metric(result, log_history, names, baselines) for names in _groups(result.after)]
    sections += answer_sections(result)
    sections += [_logged(log_history, "learning_rate", "Learning rate")]
    sections += [_logged(log_history, "grad_norm", "Gradient norm")]
    sections += _gates(result, selection)
    if result.composition is not None:
        sections += composition_sections(result.composition.weights, result.composition.mean)
    sections += [configuration_section(config)]
    method = METHODS.get(result.method, result.method)
    return Report(
        title=f"{method} on {Path(config.data.path).name}",
        command=command,
        lead=_lead(result, baselines),
        summary=_summary(result, config),
        sections=[section for section in sections if section.figure or section.table or section.folded],
    )


def _lead(result: "RunResult", baselines: Mapping[str, float]) -> str:
    name = _main_metric(result)
    before, after = number(finite(result.before[name])), number(finite(result.after[name]))
    lead = f"Test {metric_name(name)} is {after} after {result.steps} steps, {before} before"
    if baselines and name == "accuracy":
        others = " and ".join(f"{label} {number(value)}" for label, value in baselines.items())
        lead = f"{lead}; to compare: {others}"
    return " ".join([f"{lead}.", *(f"{text[0].upper()}{text[1:]}." for text in result.warnings)])


def _summary(result: "RunResult", config: "RunConfig") -> list[Fact]:
    name = _main_metric(result)
    after, before = number(finite(result.after[name])), number(finite(result.before[name]))
    trainable, total = result.trainable_parameters, result.total_parameters
    speed = f"{number(result.tokens_per_second, digits=3)} tokens/s in training" if result.tokens_per_second else ""
    validate = f"{result.validation_rows:,} to validate, " if result.validation_rows else ""
    facts = [
        Fact(f"test {metric_name(name)}", after, f"{before} before training"),
        Fact("trained parameters", f"{trainable:,}", f"{trainable / total:.2%} of {total:,}"),
        Fact("peak memory", number(result.peak_memory_bytes, "bytes")),
        Fact("wall time", f"{result.wall_time_seconds:.0f} s", speed),
        Fact("base model", config.model.name),
        Fact("data", config.data.path),
        Fact("rows", f"{result.train_rows:,} to train on, {validate}{result.test_rows:,} to test on"),
    ]
    if result.data and result.data["cut_share"]:
        share, longest = f"{result.data['cut_share']:.1%} of the texts", result.data["longest"]
        facts.append(Fact("cut", share, f"at {result.data['max_length']} tokens, the longest has {longest}"))
    if result.adapters:
        kept = sum(adapter is not None for adapter in result.adapters.values())
        facts.append(Fact("adapters kept", f"{kept} of {len(result.adapters)}"))
    return [*facts, Fact("folder", result.output_dir)]


def _comparison(result: "RunResult", baselines: Mapping[str, float]) -> Section:
    if not baselines or "accuracy" not in result.after:
        return Section("What it gains")
    rows = {**baselines, METHODS.get(result.method, result.method): result.after["accuracy"]}
    one = number(1 / result.test_rows, digits=2)
    note = f"Accuracy on the same {result.test_rows:,} test rows; one of them is {one}."
    return Section("What it gains", note, Bars("accuracy", [*rows], [*rows.values()], whole=1.0))


def _loss(result: "RunResult", history: Sequence[Mapping[str, Any]], selection: "SelectionLog | None") -> Section:
    train = [(entry["step"], finite(float(entry["loss"]))) for entry in history if "loss" in entry]
    curves = [_series("train", train)] if train else []
    curves += _evaluated(result, history, "loss")
    note = "While training: the mean over the steps since the point before. "
    return Section("Loss", note + _sets(result), Lines("step", "loss", curves, events=_events(selection)))


def _metric(
    result: "RunResult",
    history: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    baselines: Mapping[str, float],
) -> Section:
    series = [one for name in names for one in _evaluated(result, history, name, prefix=metric_name(name))]
    title = " and ".join(metric_name(name) for name in names)
    references = dict(baselines) if "accuracy" in names else {}
    label = "share" if len(names) > 1 else metric_name(names[0])
    note = _sets(result) + (" Dotted: accuracies to compare with." if references else "")
    return Section(title[0].upper() + title[1:], note, Lines("step", label, series, references=references))


def _evaluated(result: "RunResult", history: Sequence[Mapping[str, Any]], name: str, prefix: str = "") -> list[Series]:
    """A curve of the evaluations while training, and rings on the test set, before and after."""
    points = {entry["step"]: finite(entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry}
    curves = [_series(f"{prefix}, validation" if prefix else "validation", [*points.items()])] if points else []
    ends = ((0, finite(result.before[name])), (result.steps, finite(result.after[name])))
    rings = [(float(step), value) for step, value in ends if value is not None]
    return [*curves, Series(f"{prefix}, test" if prefix else "test", [], [], rings)] if rings else curves


def _sets(result: "RunResult") -> str:
    during = "on the validation set at each evaluation; " if result.validation_rows else ""
    text = f"{during}rings: on the test set before and after training."
    return text[0].upper() + text[1:]


def _series(name: str, points: Sequence[tuple[float, float | None]]) -> Series:
    return Series(name, [x for x, _ in points], [y for _, y in points])


def _logged(history: Sequence[Mapping[str, Any]], key: str, title: str) -> Section:
    points = [(entry["step"], finite(float(entry[key]))) for entry in history if key in entry]
    known = [value for _, value in points if value is not None]
    if len(known) < 2:
        return Section(title)
    log = key == "grad_norm" and min(known) > 0 and max(known) > DECADES * min(known)
    note = "Before clipping, at the steps that were logged." if key == "grad_norm" else ""
    return Section(title, note, Lines("step", title.lower(), [_series(title.lower(), points)], log_y=log))


def _gates(result: "RunResult", selection: "SelectionLog | None") -> list[Section]:
    sections = []
    if result.adapters:
        last = {name: 0.0 if one is None else one["gate"] for name, one in result.adapters.items()}
        ranks = {name: 0.0 if one is None else float(one["r"]) for name, one in result.adapters.items()}
        note = "Last value of each adapter's gate; 0 where the adapter was disconnected."
        sections.append(Section("Gates", note, by_layer(last, "gate", **_range(last.values()))))
        if len({*ranks.values()} - {0.0}) > 1:
            sections.append(Section("Ranks", "0 where the adapter was disconnected.", by_layer(ranks, "rank")))
    if selection is not None and selection.history:
        sections.append(_gates_over_time(selection))
    return sections


def _gates_over_time(selection: "SelectionLog") -> Section:
    history = selection.history
    chosen = sorted({round(i * (len(history) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)})
    moments = [history[i] for i in chosen]
    labels = labels_of(dict.fromkeys(selection.modules))
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


def _events(selection: "SelectionLog | None") -> list[Event]:
    """The moments of a selection: how many adapters were dropped and how many were widened."""
    happened: dict[int, list[str]] = {}
    for event in selection.events if selection else []:
        disconnects = event["event"] == "disconnect"
        text = f"{len(event['modules'])} dropped" if disconnects else f"{len(event['ranks'])} widened"
        happened.setdefault(event["step"], []).append(text)
    return [Event(", ".join(texts), step) for step, texts in happened.items()]


def _range(gates: Iterable[float]) -> dict[str, Any]:
    """Colors on both sides of zero only if a gate is below it by more than a trace; else they begin at zero."""
    gates = [*gates]
    return {"signed": True} if -min(gates) > 0.05 * max(map(abs, gates)) else {"low": 0.0}


def _groups(metrics: Mapping[str, float]) -> list[list[str]]:
    """Metrics other than the loss, those that share a scale together; a perplexity is the loss once more."""
    rest = [name for name in metrics if name not in ("loss", "perplexity")]
    shares = [name for name in rest if name in SHARES]
    return [*([shares] if shares else []), *([name] for name in rest if name not in SHARES)]


def _main_metric(result: "RunResult") -> str:
    return next((name for name in result.after if name != "loss"), "loss")
