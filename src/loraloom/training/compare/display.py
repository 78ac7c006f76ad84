"""A comparison on the terminal: who is better, and what it costs."""

from rich.table import Table

from loraloom.text import readable_bytes, score
from loraloom.training.compare.config import LEARNING_RATE
from loraloom.training.compare.results import Comparison, MethodResult
from loraloom.training.compare.runs import format_value


def quality_table(comparison: Comparison) -> Table:
    """The metric of each method at its best point, and the tests against the baseline."""
    keys = list(dict.fromkeys(key for m in comparison.methods if m.best for key in m.best.point))
    headings = ["learning rate" if key == LEARNING_RATE else key for key in keys]
    better = "lower" if comparison.lower_is_better else "higher"
    title = f"{comparison.metric.replace('_', ' ')} on the test set ({better} is better), mean ± spread over seeds"
    table = Table(
        "method",
        *headings,
        comparison.metric.replace("_", " "),
        "n",
        f"minus {comparison.baseline}",
        "p exact",
        "p t",
        title=title,
        title_justify="left",
    )
    for method in comparison.methods:
        best, test = method.best, method.versus_baseline
        if best is None:
            table.add_row(method.label, *["-"] * len(keys), f"{method.failed} failed", *["-"] * 4)
            continue
        spread = "" if best.spread is None else f" ± {best.spread:.4f}"
        failed = f", {method.failed} failed" if method.failed else ""
        tests = ["-"] * 3 if test is None else [f"{test.difference:+.4f}", _p(test.p_sign_flip), _p(test.p_t)]
        chosen = [format_value(best.point[key]) for key in keys]
        table.add_row(method.label, *chosen, f"{score(best.mean)}{spread}{failed}", str(len(best.values)), *tests)
    return table


def cost_table(comparison: Comparison) -> Table:
    """What each method takes at its best point."""
    retention = any(method.retention is not None for method in comparison.methods)
    kept = f"retention: {'loss' if comparison.task == 'causal-lm' else 'accuracy'}"
    names = ["method", "trainable", "peak memory", "tokens/s", "wall time", *([kept] if retention else [])]
    table = Table(*names, title="costs at that point", title_justify="left")
    for method in comparison.methods:
        table.add_row(method.label, *_costs(method)[: len(names) - 1])
    return table


def _costs(method: MethodResult) -> list[str]:
    if method.best is None or method.tokens_per_second is None or method.wall_time_seconds is None:
        return ["-"] * 5
    return [
        f"{method.trainable_parameters:,}",
        readable_bytes(method.peak_memory_bytes),
        f"{method.tokens_per_second:,.0f}",
        f"{method.wall_time_seconds:.0f} s",
        "-" if method.retention is None else f"{score(method.retention_before or 0.0)} -> {score(method.retention)}",
    ]


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
