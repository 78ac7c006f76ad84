"""The serving table: well-formed, the same in the docs, and applied to adapters as it says."""

from pathlib import Path

import pytest

from loraloom.adapter.serving import allowed_rank, serving_data, serving_markdown

EFFECTS = {"ok", "rejected", "wrong", "varies"}


def test_every_rule_is_complete():
    data = serving_data()
    assert data["features"].keys() == data["ways_out"].keys()
    assert set(data["ways_out"].values()) <= {"export", "lossy", "merge", "save"}
    for server in data["servers"].values():
        assert server["rules"].keys() <= data["features"].keys()
        assert server["sources"]
        assert "{adapter}" in server["run"]
        for rule in server["rules"].values():
            assert rule.keys() == {"effect", "why"}
            assert rule["effect"] in EFFECTS


def test_the_page_is_made_from_the_data():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert serving_markdown() in page


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (257, 320), (512, 512), (513, None)])
def test_vllm_allows_some_ranks(rank, allowed):
    assert allowed_rank("vllm", rank) == allowed
    assert allowed_rank("sglang", rank) == rank
