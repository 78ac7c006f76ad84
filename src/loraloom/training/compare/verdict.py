"""What a comparison says in words: who is ahead, by more than the spread over seeds or not, and the exact p."""

from loraloom.text import number
from loraloom.training.compare.results import Comparison, MethodResult


def verdict(comparison: Comparison) -> str:
    """A sentence on the baseline, and one for each other method that finished: its difference beside the spread.

    The spread is the larger of the two standard deviations over seeds. It is a yardstick, not a test: the exact p is.
    """
    methods = {method.label: method for method in comparison.methods}
    baseline = methods[comparison.baseline]
    if all(method.best is None for method in methods.values()):
        return "No run has finished."
    if baseline.best is None:
        return f"{baseline.label}, the baseline, has no finished run: nothing can be compared with it."
    metric = comparison.metric.replace("_", " ")
    sentences = [f"{baseline.label} has {metric} {_mean(baseline)}."]
    for method in methods.values():
        if method is not baseline:
            sentences.append(_sentence(method, baseline, comparison.lower_is_better))
    return " ".join(sentences)


def _sentence(method: MethodResult, baseline: MethodResult, lower_is_better: bool) -> str:
    test = method.versus_baseline
    if method.best is None:
        return f"{method.label} has no finished run."
    if test is None:
        return f"{method.label} has {_mean(method)}, and no seed in common with {baseline.label}."
    difference = number(abs(test.difference), digits=2)
    if not test.difference:
        return f"{method.label} has the same mean."
    better = (test.difference < 0) == lower_is_better
    side = f"{method.label} is {'better' if better else 'worse'} by {difference}"
    spreads = [one.best.spread for one in (method, baseline) if one.best is not None and one.best.spread is not None]
    if test.n < 2 or not spreads:
        return f"{side} with one seed, which says nothing of the spread."
    spread = max(spreads)
    more = "more" if abs(test.difference) > spread else "less"
    return f"{side}, {more} than the spread over seeds ({number(spread, digits=2)}){_p(test.p_sign_flip, test.n)}."


def _p(p: float | None, pairs: int) -> str:
    if p is None:
        return ""
    smallest = ", the smallest that" if p <= 2.0 ** (1 - pairs) else " with"
    return f"; exact p {number(p, digits=2)}{smallest} {pairs} seeds{' can give' if smallest[0] == ',' else ''}"


def _mean(method: MethodResult) -> str:
    assert method.best is not None
    spread = method.best.spread
    return number(method.best.mean) + ("" if spread is None else f" ± {number(spread, digits=2)}")
