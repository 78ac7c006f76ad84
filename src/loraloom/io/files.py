"""Writing files so that a reader never sees half of one."""

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from loraloom.errors import InputError


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`: aside in the same folder first, then renamed over it, which the file system does at once.

    Raises:
        OSError: the folder is missing or not writable; `path` is then as it was before.
    """
    with file_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def file_atomically(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under; it becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # a plain file: the umask decides who reads it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `path` to write into; it becomes `path` by a rename when the block ends without an error.

    The folder of a run that was killed is removed by the next one, and so is the half of an overwriting that a kill
    left behind: until the rename the old `path` is whole.

    Args:
        path: what is to be made. Its parents are made as well.
        overwrite: replace a folder that has something in it.

    Raises:
        InputError: `path` is a file, or has something in it, or another process is writing it now.
    """
    path = path.expanduser().resolve()
    new, old = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "replaced"))
    path.parent.mkdir(parents=True, exist_ok=True)
    new.mkdir(exist_ok=True)
    with _locked(path):
        try:
            if old.exists() and not path.exists():
                old.rename(path)
            check_new_folder(path, overwrite)
            for left in new.iterdir():
                _remove(left)
            yield new
            if path.exists() and any(path.iterdir()):
                _remove(old)
                path.rename(old)
            new.rename(path)  # over an empty folder, or over nothing
            _remove(old)
        except BaseException:
            _remove(new)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time; the system frees the lock however the process ends."""
    # Not beside the folder: a rename on Windows cannot move an open file, and a lock that is removed is no lock.
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"loraloom-{name}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"another process is writing {path} now: wait for it, or choose another folder", code="locked"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raises InputError where the folder to write is, or holds, one that is read: overwriting would delete it."""
    out = out.expanduser().resolve()
    for path in inputs:
        if out == path.resolve() or out in path.resolve().parents:
            raise InputError(
                f"the output folder {out} is or holds {path}, which is read: choose another one", code="folder-is-read"
            )


def check_new_folder(path: Path, overwrite: bool = False) -> None:
    """Raises InputError where `path` is a file, or a folder with something in it that is not to be overwritten."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; expected a folder to make", code="file-exists")
    if not overwrite and path.exists() and any(path.iterdir()):
        raise InputError(
            f"{path} is not empty: choose another folder, or pass --overwrite to replace it", code="not-empty"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
