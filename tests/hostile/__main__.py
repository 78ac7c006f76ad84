"""``python -m tests.hostile``: a part of the corpus, or all of it, on this code or on another version's.

Prints the failures and a table by family, and exits with 1 where there is a failure.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

from tests.hostile.corpus import corpus, sample
from tests.hostile.originals import make_originals, make_run
from tests.hostile.rule import Bench, Outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, help="how many, from the beginning of the shuffled list; all of them")
    parser.add_argument("--skip", type=int, default=0, help="how many to leave out before that")
    parser.add_argument("--per-family", type=int, help="at most so many cases of each family")
    parser.add_argument("--family", help="one family alone")
    parser.add_argument("--one-verb", action="store_true", help="one verb a case, in turn")
    parser.add_argument("--code", type=Path, help="src of another version; folders are made by this one")
    parser.add_argument("--failures", type=int, default=40, help="how many to print, one of each kind first")
    options = parser.parse_args()
    environment = {"PYTHONPATH": f"{options.code}{os.pathsep}{Path.cwd()}"} if options.code else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "originals").mkdir()
        make_originals(folder / "originals")
        make_run(folder / "originals")
        cases = [c for c in corpus(folder / "originals") if options.family in (None, c.family)][options.skip :]
        cases = sample(cases, options.per_family) if options.per_family else cases
        with Bench(folder, environment) as bench:
            outcomes = []
            for outcome in bench.outcomes(islice(cases, options.cases), not options.one_verb):
                outcomes.append(outcome)
                if len(outcomes) % 500 == 0:
                    print(f"{len(outcomes)} tried", file=sys.stderr)
    _show(outcomes, options.failures)
    return int(any(outcome.failure for outcome in outcomes))


def _show(outcomes: list[Outcome], most: int) -> None:
    kinds: dict[tuple, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.failure:
            kinds[outcome.verb, outcome.failure, outcome.line[:40]].append(outcome)
    for found in sorted(kinds.values(), key=len, reverse=True)[:most]:
        first = found[0]
        print(f"{len(found):5} x {first.verb}: {first.failure}; {str(first.case)!a:.120}\n        {first.line!a:.220}")
    print(f"\n{'family':12} {'cases':>7} {'runs':>7} {'failures':>9} {'slowest s':>10}")
    families = sorted({outcome.case.family for outcome in outcomes})
    for family in (*families, "all"):
        own = [outcome for outcome in outcomes if family in (outcome.case.family, "all")]
        failures = sum(outcome.failure is not None for outcome in own)
        slowest = max((outcome.seconds for outcome in own), default=0)
        print(f"{family:12} {len({str(o.case) for o in own}):7} {len(own):7} {failures:9} {slowest:10.2f}")
    print(f"\nexit codes: {dict(sorted(Counter(outcome.code for outcome in outcomes).items()))}")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(f"slowest: {slowest.seconds:.2f} s of CPU, {slowest.verb} on {str(slowest.case)!a}")


if __name__ == "__main__":
    sys.exit(main())
