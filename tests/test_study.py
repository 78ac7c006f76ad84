"""The studies' harness: pairs, intervals and tables say what the rows say, and no run that diverged helps an arm."""

import math

import numpy as np
import pytest
import torch

from benchmarks.study.harness import Store, answers, arm_table, effect, read_rows
from loraloom.training.compare.statistics import sign_flip_p

GROUPS, SEEDS, ITEMS = ("books", "film"), range(6), 50


def rows_of(arm: str, chance: float, generator: np.random.Generator) -> list[dict]:
    found = []
    for group in GROUPS:
        for seed in SEEDS:
            right = generator.random(ITEMS) < chance
            text = "".join("01"[int(one)] for one in right)
            found.append({"arm": arm, "group": group, "seed": seed, "right": text, "accuracy": right.mean()})
    return found


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    return [*rows_of("a", 0.7, generator), *rows_of("b", 0.6, generator)]


def test_an_effect_is_the_mean_of_paired_differences(rows):
    by = {(row["arm"], row["group"], row["seed"]): row["accuracy"] for row in rows}
    differences = [by["a", group, seed] - by["b", group, seed] for group in GROUPS for seed in SEEDS]
    found = effect(rows, "a", "b")
    assert found.mean == pytest.approx(np.mean(differences))
    assert found.p == sign_flip_p(differences)
    assert (found.pairs, found.seeds) == (12, 6)
    assert found.interval[0] < found.mean < found.interval[1]


def test_the_interval_has_the_width_of_independent_items(rows):
    """Each of the runs answers items of its own here, so the width follows from seeds and items alone."""
    found = effect(rows, "a")
    own = [[row for row in rows if (row["arm"], row["group"]) == ("a", group)] for group in GROUPS]
    values = [np.array([[int(digit) for digit in row["right"]] for row in some]) for some in own]
    # Var of the bootstrap's mean: seeds (shared by the groups), items of each group, and both at once.
    seeds = np.mean([part.mean(1) for part in values], 0)
    variance = seeds.var() / len(SEEDS)
    variance += sum(part.mean(0).var() / ITEMS for part in values) / len(values) ** 2
    within = [part - part.mean(0) - part.mean(1, keepdims=True) + part.mean() for part in values]
    variance += sum(part.var() / part.size for part in within) / len(values) ** 2
    # 4000 draws: a quantile near 2.5% is known to 4% of the standard deviation, three of them to 12%.
    assert (found.interval[1] - found.interval[0]) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.12)


def test_an_arm_against_itself_is_nothing(rows):
    copies = [{**row, "arm": "copy"} for row in rows if row["arm"] == "a"]
    found = effect([*rows, *copies], "copy", "a")
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)


def test_a_seed_that_is_not_finished_in_every_group_is_left_out(rows):
    cut = [row for row in rows if (row["arm"], row["group"], row["seed"]) != ("b", "film", 5)]
    assert effect(cut, "a", "b") == effect([row for row in rows if row["seed"] != 5], "a", "b")


def test_without_runs_in_common_there_is_no_effect(rows):
    assert effect(rows, "a", "missing") is None
    assert len(arm_table(rows, ["a", "missing"], ["missing"])) == 3


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_run_that_diverged_is_all_wrong(broken):
    logits = torch.tensor([[0.0, 1.0], [2.0, broken]])
    found = answers(logits, torch.tensor([1, 1]))
    assert found == {"accuracy": 0.0, "right": "00", "failed": True}
    assert answers(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1])) == {"accuracy": 0.5, "right": "10"}


def test_a_nan_counts_as_nothing(rows):
    numbers = [{"arm": arm, "seed": seed, "x": value} for arm, value in (("a", 1.0), ("b", math.nan)) for seed in SEEDS]
    found = effect(numbers, "a", "b", key="x")
    assert (found.mean, found.p) == (1.0, 2 / 2**6)


def test_few_seeds_of_a_bare_number_have_no_interval(rows):
    few = [{**row, "right": None} for row in rows if row["seed"] < 4]
    assert effect(few, "a", "b", key="accuracy").interval is None
    assert effect(rows, "a", "b", key="accuracy").interval is not None


def test_the_search_takes_the_best_mean_and_no_nan(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    store = Store(tmp_path / "rows.jsonl", {"STEPS": 3}, [data])
    for rate, values in {0.1: (0.9, 0.8), 0.2: (math.nan, 1.0), 0.3: (0.9, 0.7)}.items():
        for seed, value in enumerate(values):
            store.keep({"stage": "search", "arm": "a", "seed": seed, "rates": [rate], "accuracy": value})
    assert store.best("a", [(0.3,), (0.2,), (0.1,)]) == (0.1,)


def test_every_arm_is_searched_alike_and_tested_at_its_best_rate_once(tmp_path):
    calls = []

    def run(stage, arm, rate, seed):
        calls.append((stage, arm, rate, seed))
        return {"accuracy": rate if arm == "up" else -rate}

    for _ in range(2):  # the second time everything is on disk
        Store(tmp_path / "rows.jsonl", {}, []).search_then_test(["up", "down"], [1.0, 2.0], [7], [8, 9], run)
    search = [("search", arm, rate, 7) for arm in ("up", "down") for rate in (1.0, 2.0)]
    assert calls == search + [
        ("test", arm, rate, seed) for seed in (8, 9) for arm, rate in (("up", 2.0), ("down", 1.0))
    ]


def test_rows_are_found_again_and_other_settings_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    path = tmp_path / "rows.jsonl"
    row = {"stage": "test", "arm": "a", "seed": 0, "accuracy": 0.5}
    Store(path, {"RATES": (1, 2)}, [data]).keep(row)
    assert read_rows(path) == [row]
    assert Store(path, {"RATES": (1, 2)}, [data]).done(stage="test", arm="a") == row
    with pytest.raises(SystemExit):
        Store(path, {"RATES": (1, 3)}, [data])
    data.write_text("{}\n{}\n")
    with pytest.raises(SystemExit):
        Store(path, {"RATES": (1, 2)}, [data])
