"""How the library tells what it is doing. It draws nothing: the command line does, or whoever calls."""

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""(description, done, total), called before the first and after each item: ("Folding", 3, 24)."""


def silent(description: str, done: int, total: int) -> None:
    """A progress that goes nowhere."""


def tracked(items: Collection[T], description: str, progress: Progress) -> Iterator[T]:
    """The items, one by one, telling how many are done."""
    progress(description, 0, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress(description, done, len(items))
