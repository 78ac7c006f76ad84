"""What lies in a base model's folder and is copied, left, or refused."""

import pytest

from loraloom.errors import InputError
from loraloom.merge.extra_files import other_files
from tests.refusals import coded


def files(folder, out):
    return set(other_files(folder, out))


@pytest.fixture
def base(tmp_path):
    for name in ("config.json", "model.safetensors", "1_Dense/config.json", "1_Dense/model.safetensors"):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    return tmp_path / "base"


WANTED = {"config.json", "1_Dense/config.json", "1_Dense/model.safetensors"}


def test_earlier_results_in_the_base_are_left(base):
    for name in ("merged/merge.json", "merged/config.json", "run/adapter_config.json", "run/README.md"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("")
    (base / "merge.json").write_text("")  # the base is itself the result of a merge
    assert files(base, base / "out") == WANTED


def test_a_link_out_of_the_base_is_refused_and_one_within_is_copied(base, tmp_path):
    (base / "again.json").symlink_to(base / "config.json")
    assert files(base, base / "out") == WANTED | {"again.json"}
    (tmp_path / "secret").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, check=coded("link", "notes.txt")) as error:
        files(base, base / "out")
    assert error.value.code == "link"


def test_the_hubs_cache_is_made_of_links(base, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "x").write_text("")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert files(snapshot, tmp_path / "out") == {"config.json"}
