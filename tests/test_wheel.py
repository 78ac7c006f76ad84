"""The wheel holds every file of the package, and what a package index shows of it is right away from the repository."""

import re
import subprocess
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder

from loraloom import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    with ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(wheel.read(f"loraloom-{__version__}.dist-info/METADATA").decode())


def test_every_file_of_the_package_is_in_it_and_nothing_else(wheel):
    known = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = {name.removeprefix("src/") for name in known.split() if (ROOT / name).is_file()}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_its_readme_links_to_the_repository_from_anywhere(metadata):
    links = re.findall(r"\]\(([^)\s]+)\)", metadata.get_payload())
    assert len(links) > 20
    assert all(link.startswith(("https://", "#")) for link in links)


def test_the_licences_come_along(wheel):
    assert {"LICENSE", "NOTICE"} == {Path(n).name for n in wheel.namelist() if "/licenses/" in n}


def test_the_readmes_extras_exist(metadata):
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    named = {extra for found in re.findall(r"loraloom\[([\w,]+)\]", text) for extra in found.split(",")}
    assert named
    assert named <= set(metadata.get_all("Provides-Extra"))
