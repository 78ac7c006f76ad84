"""Folders that appear at once, whatever happens while they are written."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from loraloom.errors import InputError
from loraloom.io.files import folder_atomically, write_text_atomically
from loraloom.io.stream import save_tensors
from tests.refusals import coded

WRITER = """
import sys, time
from pathlib import Path
from loraloom.io.files import folder_atomically, write_text_atomically
from loraloom.io.stream import save_tensors
with folder_atomically(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def write(path, text, **options):
    with folder_atomically(path, **options) as folder:
        assert not (path / "x").exists() or (path / "x").read_text() != text
        (folder / "x").write_text(text)


def test_a_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "deep"
    write(path, "1")
    assert (path / "x").read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_folder_is_filled_and_a_full_one_is_not(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "1")
    with pytest.raises(InputError, check=coded("not-empty", "--overwrite")):
        write(tmp_path / "out", "2")
    assert (tmp_path / "out" / "x").read_text() == "1"
    write(tmp_path / "out", "2", overwrite=True)
    assert (tmp_path / "out" / "x").read_text() == "2"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, check=coded("file-exists")):
        write(tmp_path / "out", "1", overwrite=True)


def test_an_error_leaves_everything_as_it_was(tmp_path):
    write(tmp_path / "out", "1")
    with pytest.raises(FileNotFoundError), folder_atomically(tmp_path / "out", overwrite=True) as folder:
        (folder / "a" / "x").write_text("2")
    assert (tmp_path / "out" / "x").read_text() == "1"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_two_at_once_and_after_a_kill(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    with pytest.raises(InputError, check=coded("locked")):
        write(out, "1")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert os.listdir(tmp_path) == [".out.unfinished"]
    write(out, "1")
    assert os.listdir(out) == ["x"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    write(tmp_path / ".out.replaced", "1")
    with pytest.raises(InputError, check=coded("not-empty")):
        write(tmp_path / "out", "2")
    assert (tmp_path / "out" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_after_the_renames_leaves_nothing(tmp_path):
    write(tmp_path / "out", "2")
    write(tmp_path / ".out.replaced", "1")
    write(tmp_path / "out", "3", overwrite=True)
    assert (tmp_path / "out" / "x").read_text() == "3"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_reads_what_is_written(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text_atomically(tmp_path / "text", "1")
        save_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "text"
    write_text_atomically(path, "1")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "2\ud800")
    assert path.read_text() == "1"
    assert os.listdir(tmp_path) == ["text"]
