"""Model cards and publishing: what is written is what the hub reads."""

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl

from loraloom.card import Card, render_card, write_card
from loraloom.errors import RunFailedError
from loraloom.io.hub import push_folder
from tests.refusals import coded

CARD = Card(
    title="a card",
    summary="An adapter.",
    base_model="owner/base",
    tags=["moslora"],
    usage="import loraloom",
    command="loraloom train RUN.yaml --data.path 'a b.jsonl'",
    metrics=[["metric", "before", "after"], ["accuracy", "0.1", "0.9"]],
    facts={"data, sha256": "abc"},
    serving=[["server", "loads", "how"], ["vLLM", "no", "a | b\nc"]],
    configuration="text: '```'\n",
    versions={"torch": "2", "peft": "1"},
)


def test_the_hub_reads_the_header(tmp_path):
    path = write_card(CARD, tmp_path)
    card = ModelCard.load(path)
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["loraloom", "moslora"]
    assert card.text.strip().startswith("# a card")


def test_every_part_is_there_and_none_breaks_another():
    text = render_card(CARD)
    for part in (CARD.summary, CARD.usage, CARD.command, "| accuracy | 0.1 | 0.9 |", "- data, sha256: abc", "torch 2"):
        assert part in text
    assert "| vLLM | no | a \\| b c |" in text
    assert "````yaml\ntext: '```'\n````" in text  # the configuration has a fence of its own


def test_what_is_empty_is_left_out():
    text = render_card(Card(title="t", summary="s"))
    assert "##" not in text
    header = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in header


@pytest.mark.parametrize("name", ["builtin:minilm", "/models/base", "./base", "base"])
def test_a_base_that_the_hub_does_not_know_is_not_in_the_header(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = render_card(Card(title="t", summary="s", base_model=name))
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert f"`{name.removeprefix('/models/')}`" in text  # a local folder by its name: the rest is of one machine


def test_push_uploads_all_but_the_checkpoints(tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda self, name, **keys: calls.update(made=name, **keys) or RepoUrl(f"https://huggingface.co/me/{name}"),
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **keys: calls.update(keys))
    assert push_folder(tmp_path, "mine", private=True) == "https://huggingface.co/me/mine"
    assert calls["made"] == "mine"
    assert calls["private"]
    assert calls["exist_ok"]
    assert calls["repo_id"] == "me/mine"
    assert calls["folder_path"] == tmp_path
    assert "checkpoints/*" in calls["ignore_patterns"]


def test_a_push_that_fails_says_what_to_do(tmp_path):
    with pytest.raises(RunFailedError, check=coded("not-pushed")):
        push_folder(tmp_path, "me/mine")  # the tests run offline
