"""The serving table: well-formed, the same in the docs, and applied to adapters as it says."""

import re
from pathlib import Path

import pytest

from loraloom.adapter.serving import allowed_rank, missing_siblings, serving_data, serving_markdown

EFFECTS = {"ok", "rejected", "wrong", "varies"}


def test_every_rule_is_complete():
    data = serving_data()
    assert data["features"].keys() == data["ways_out"].keys()
    assert set(data["ways_out"].values()) <= {"export", "lossy", "merge", "save"}
    for server in data["servers"].values():
        assert server["rules"].keys() <= data["features"].keys()
        assert server["sources"]
        assert server["version"]
        assert re.fullmatch(r"\d{4}-\d\d", server["date"])
        assert "{adapter}" in server["run"]
        for rule in server["rules"].values():
            assert rule.keys() == {"effect", "why", "how"}
            assert rule["how"] in ("run", "read")
            assert rule["effect"] in EFFECTS


def test_the_page_is_made_from_the_data():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert serving_markdown() in page


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (257, 320), (512, 512), (513, None)])
def test_vllm_allows_some_ranks(rank, allowed):
    assert allowed_rank("vllm", rank) == allowed
    assert allowed_rank("sglang", rank) == rank


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        ([], []),
        (["o_proj", "a.down_proj"], []),
        (["a.q_proj"], ["a.v_proj"]),
        (["a.v_proj"], ["a.q_proj"]),
        (["a.k_proj"], ["a.q_proj", "a.v_proj"]),
        (["a.q_proj", "a.v_proj"], []),
        (["a.up_proj", "b.gate_proj"], ["a.gate_proj"]),
        (["q_proj", "b.v_proj", "b.q_proj"], ["v_proj"]),
    ],
)
def test_what_sglang_needs_beside_adapted_modules(modules, missing):
    assert list(missing_siblings(modules)) == missing
    assert not missing_siblings([*modules, *missing])
