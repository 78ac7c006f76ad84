"""The built-in data set: docstrings of the running Python's standard library, labelled by their package.

Text: the first paragraph of every module, class and function docstring. Label: the top-level module or package that
it comes from; the twelve with most texts are kept. The sources are parsed with `ast`, never imported. Train and test
are separated by a hash of the text, so the split depends on nothing but the texts, and equal texts cannot be on both
sides.
"""

import ast
import functools
import hashlib
import inspect
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CLASSES = 12
TEST_PERCENT = 20
# No part of the library's own documentation: installed packages, tests, and the IDE, whose texts are about editing.
EXCLUDED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "__pycache__"}


def text_hash(text: str) -> int:
    """A number that depends on the text alone: the same in every process, on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@functools.cache
def stdlib_docstrings(library: Path | None = None) -> tuple[list[str], list[str], list[bool]]:
    """Read the standard library's docstrings.

    Args:
        library: directory of the Python sources; default is the running interpreter's.

    Returns:
        Three lists of one length, in the order of files and lines: texts, labels (top-level package), and whether the
        text belongs to the test set (about 20%). No text occurs twice; one that occurs in several packages is left
        out, since it has no right label.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    owner: dict[str, str | None] = {}
    for package, text in _paragraphs(library):
        owner[text] = package if owner.get(text, package) == package else None
    sizes = Counter(package for package in owner.values() if package)
    # Ties are broken by name, so that the choice does not depend on the file system's order.
    largest = {name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:CLASSES]}
    rows = [(text, package) for text, package in owner.items() if package in largest]
    texts = [text for text, _ in rows]
    return texts, [package for _, package in rows], [text_hash(text) % 100 < TEST_PERCENT for text in texts]


def as_questions(texts: list[str], labels: list[str]) -> dict[str, list[str]]:
    """The same for a language model: columns `prompt` and `completion`; the answer is the package's name."""
    return {
        "prompt": [f"Docstring: {text}\nPackage of Python's standard library:" for text in texts],
        "completion": [f" {label}" for label in labels],
    }


def _paragraphs(library: Path) -> Iterator[tuple[str, str]]:
    """(top-level package, first paragraph) of every docstring under `library`, file by file in sorted order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if EXCLUDED_DIRECTORIES.intersection(parts[:-1]):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own strings
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # a few files are templates or deliberately broken
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                paragraph = _first_paragraph(ast.get_docstring(node, clean=False))
                if paragraph:
                    yield parts[0].removesuffix(".py"), paragraph


def _first_paragraph(docstring: str | None) -> str:
    """Text up to the first blank line, on one line; empty for no docstring."""
    if not docstring:
        return ""
    return " ".join(inspect.cleandoc(docstring).strip().split("\n\n", 1)[0].split())
