"""COMPARE.yaml: the sections of RUN.yaml for all runs, and `compare`, which says what differs from run to run.

Importing this file imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.training.config import COMPOSITION, METHODS_WITHOUT_ADAPTER, Method, Number, RunConfig
from loraloom.training.load import SECTION_NAMES, build_config, build_section, read_sections, unknown_key
from loraloom.training.metrics import LOWER_IS_BETTER, main_metric, metric_names

LEARNING_RATE = "training.learning_rate"
FOLDER = "loraloom-comparison"
SECTIONS_OF_METHODS = tuple(name for name in SECTION_NAMES if name not in ("data", "output"))

Point = Mapping[str, Any]
"""Where a run lies in the grid or search space: `section.key` -> value."""


@dataclass
class CompareSection:
    """The section `compare`."""

    methods: list[str] | dict[str, dict | None] = field(default_factory=dict)
    """Label -> sections of RUN.yaml that differ for this method. A label that is a name of method.name (`lora`,
    `dora`, ...) means this method. `learning_rates` beside the sections replaces those below. Or a list of names."""
    baseline: str | None = None
    """Label of the method that the others are tested against. Default: the first one."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Every method trains once with each."""
    learning_rates: list[Number] | None = None
    """Every method trains with each, and the best one stands in the table. Default: training.learning_rate alone."""
    metric: str | None = None
    """What decides. Default: the first of training.metrics, or of the task's metrics; `loss` for causal-lm."""
    search: dict | None = None
    """Instead of learning_rates: `trials` for each method, and `section.key`: {low, high, log, step} or a list of
    choices, for optuna (extra `search`). `learning_rate` is short for `training.learning_rate`."""


@dataclass(frozen=True)
class Entry:
    """One method of a comparison."""

    label: str
    sections: Mapping[str, Mapping[str, Any]]
    """RUN.yaml's sections, the method's own over those of all."""
    learning_rates: Sequence[float]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers if both ends are."""

    low: Number
    high: Number
    log: bool = False
    """Equal chances for equal factors."""
    step: Number | None = None


@dataclass(frozen=True)
class Search:
    """A search space, and how many points of it each method tries."""

    trials: int
    space: Mapping[str, Range | Sequence[Any]]
    """`section.key` -> its range, or its choices."""


@dataclass(frozen=True)
class Plan:
    """What COMPARE.yaml asks for."""

    entries: Sequence[Entry]
    baseline: str
    seeds: Sequence[int]
    metric: str
    task: str
    folder: Path
    search: Search | None

    @property
    def lower_is_better(self) -> bool:
        """Whether the smaller value of the metric wins."""
        return self.metric in LOWER_IS_BETTER


def load_plan(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Plan:
    """Read COMPARE.yaml and check all of it, also every method's configuration.

    Args:
        path: the file.
        overrides: (`section.key`, value as YAML text), also for the section `compare`; later ones win.

    Raises:
        InputError: what `load_config` raises, for the file or for one of its methods; or the section `compare` is
            missing or contradicts itself.
    """
    sections = read_sections(path, ("compare", *SECTION_NAMES), overrides)
    compare: CompareSection = build_section(CompareSection, "compare", sections.pop("compare"))
    if not compare.methods:
        raise InputError(
            f"{path}: compare.methods is missing; expected names such as [lora, moslora], or {{label: ...}}",
            code="no-methods",
        )
    for key in sections["output"]:
        if key != "dir":
            raise InputError(
                f"output.{key} has no meaning for a comparison, which keeps its finished runs: remove it",
                code="no-meaning",
            )
    folder = Path(sections.pop("output").get("dir", FOLDER))
    training = sections["training"]
    if not training.get("load_best_model_at_end"):  # it needs checkpoints; else a killed run is redone without them
        training.setdefault("save_strategy", "no")
    base = build_config(sections)  # so that a mistake in the file is not reported as one of a method
    search = None if compare.search is None else _search(compare)
    rates = compare.learning_rates or [base.training["learning_rate"]]
    methods = compare.methods if isinstance(compare.methods, dict) else dict.fromkeys(compare.methods)
    _check_list("compare.seeds", compare.seeds)
    entries = [_entry(label, own or {}, sections, rates, compare) for label, own in methods.items()]
    baseline = entries[0].label if compare.baseline is None else compare.baseline
    if baseline not in methods:
        raise InputError(
            f"compare.baseline: {baseline!r} is none of {', '.join(methods)}{did_you_mean(baseline, methods)}",
            code="unknown-choice",
        )
    metric = compare.metric or main_metric(base.model.task, base.training.get("metrics"))
    known = metric_names(base.model.task, base.training.get("metrics"))
    if metric not in known:
        raise InputError(
            f"compare.metric: {metric!r} is none of {', '.join(known)}{did_you_mean(metric, known)}",
            code="unknown-metric",
        )
    plan = Plan(entries, baseline, compare.seeds, metric, base.model.task, folder, search)
    _check_configurations(plan)
    return plan


def configure(entry: Entry, point: Point, seed: int) -> RunConfig:
    """The run of `entry` at `point` with `seed`; its output section is the default one.

    Raises:
        InputError: the configuration is wrong.
    """
    sections = {name: dict(values) for name, values in entry.sections.items()}
    for key, value in {**point, "training.seed": seed}.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return build_config(sections)


def _entry(
    label: str,
    own: Mapping[str, Any],
    base: Mapping[str, Mapping[str, Any]],
    rates: Sequence[float],
    compare: CompareSection,
) -> Entry:
    place = f"compare.methods.{label}"
    for key, value in own.items():
        if key in ("data", "output", "compare"):
            raise InputError(
                f"{place}: {key} is the same for all methods: give it in the file's own section {key!r}",
                code="set-elsewhere",
            )
        if key not in (*SECTIONS_OF_METHODS, "learning_rates"):
            raise unknown_key(place, key, (*SECTIONS_OF_METHODS, "learning_rates"))
        if key != "learning_rates" and not isinstance(value, dict):
            raise InputError(f"{place}: section {key!r} holds {value!r}; expected keys and values", code="option-value")
    if "task" in own.get("model", {}):
        raise InputError(
            f"{place}: model.task is the same for all methods: give it in the file's own section 'model'",
            code="set-elsewhere",
        )
    for key, owner in {"seed": "compare.seeds", "learning_rate": f"{place}.learning_rates"}.items():
        if key in own.get("training", {}):
            raise InputError(f"{place}: training.{key} is set by the comparison: use {owner}", code="set-elsewhere")
    if "learning_rates" in own and compare.search is not None:
        raise InputError(
            f"{place}: learning_rates and compare.search exclude each other: remove one of them", code="exclusive"
        )
    method = dict(own.get("method", {}))
    names = get_args(Method)
    if isinstance(compare.methods, list) and label not in names:
        raise InputError(
            f"compare.methods: {label!r} is none of {', '.join(names)}{did_you_mean(label, names)}",
            code="unknown-choice",
        )
    if "name" not in method and label in names:
        method["name"] = label
    if method.get("name") not in (
        *METHODS_WITHOUT_ADAPTER,
        COMPOSITION,
    ):  # they have no rank to inherit
        method = {**base["method"], **method}
    sections = {**{name: {**values, **own.get(name, {})} for name, values in base.items()}, "method": method}
    own_rates = own.get("learning_rates", rates)
    _check_list(f"{place}.learning_rates" if "learning_rates" in own else "compare.learning_rates", own_rates)
    return Entry(label, sections, own_rates)


def _check_list(key: str, values: Any) -> None:
    """Seeds and rates: numbers, at least one, none twice."""
    if not isinstance(values, list) or not values or any(type(value) not in (int, float) for value in values):
        raise InputError(f"{key}: {values!r} is not a list of one or more numbers", code="option-value")
    if len(set(values)) != len(values):
        raise InputError(f"{key}: {values} has a value twice", code="duplicate")


def _search(compare: CompareSection) -> Search:
    if compare.learning_rates is not None:
        raise InputError(
            "compare.learning_rates and compare.search exclude each other: remove one of them", code="exclusive"
        )
    space = dict(compare.search or {})
    trials = space.pop("trials", 20)
    if type(trials) is not int or trials < 1:
        raise InputError(f"compare.search.trials: {trials!r} is not a number of trials, 1 or more", code="out-of-range")
    if not space:
        raise InputError(
            "compare.search has no key to vary; expected such as learning_rate: {low: 1e-5, high: 1e-2}",
            code="search-space",
        )
    for name in list(space):
        key = LEARNING_RATE if name == "learning_rate" else name
        space[key] = _values(key, space.pop(name))
    return Search(trials, space)


def _values(key: str, value: Any) -> Range | list[Any]:
    place = f"compare.search.{key}"
    section, _, rest = key.partition(".")
    if section not in SECTIONS_OF_METHODS or not rest or key in ("training.seed", "model.task", "method.name"):
        raise InputError(
            f"{place}: expected section.key with a section of {', '.join(SECTIONS_OF_METHODS)}", code="unknown-key"
        )
    if isinstance(value, list) and value:
        for choice in value:
            if not isinstance(choice, str | bool | int | float | None):
                raise InputError(
                    f"{place}: choice {choice!r} is not a word, a number, true, false or null", code="search-space"
                )
        return value
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys():
        raise InputError(
            f"{place}: {value!r} is neither {{low: ..., high: ...}} nor a list of choices", code="search-space"
        )
    numbers: Range = build_section(Range, place, value)
    if numbers.low >= numbers.high or (numbers.log and numbers.low <= 0):
        raise InputError(f"{place}: {value} needs low < high, and low > 0 with log", code="search-space")
    if numbers.log and numbers.step is not None:
        raise InputError(f"{place}: log and step exclude each other: remove one of them", code="exclusive")
    return numbers


def _check_configurations(plan: Plan) -> None:
    """Build each method's first run, and refuse two labels for the same thing."""
    seen: list[tuple[str, RunConfig]] = []
    for entry in plan.entries:
        point = {LEARNING_RATE: entry.learning_rates[0]} if plan.search is None else _corner(plan.search)
        try:
            config = configure(entry, point, seed=0)
        except InputError as error:
            raise InputError(f"compare.methods.{entry.label}: {error}", code="method") from None
        for label, other in seen:
            if config == other:
                raise InputError(
                    f"compare.methods: {label!r} and {entry.label!r} are the same run: "
                    "change a key of one or remove it",
                    code="duplicate",
                )
        seen.append((entry.label, config))


def _corner(search: Search) -> Point:
    """Some point of the space."""
    return {key: values.low if isinstance(values, Range) else values[0] for key, values in search.space.items()}
