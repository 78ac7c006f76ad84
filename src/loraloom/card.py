"""Model cards: README.md beside saved weights, with what someone needs who finds the folder a year later.

The exact command and configuration, versions, a hash of the data, what was measured, and where the weights can be
served. The header is the hub's metadata (huggingface_hub's ModelCardData).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from loraloom.io.files import write_text_atomically

FILE = "README.md"


@dataclass(frozen=True)
class Card:
    """What a card says; what is empty is left out."""

    title: str
    summary: str
    """A paragraph: what the folder holds."""
    base_model: str | None = None
    """Folder or hub repository of the base model."""
    library: str = "peft"
    """Which library loads the weights: the hub's `library_name`."""
    tags: Sequence[str] = ()
    usage: str = ""
    """Python that loads it."""
    command: str = ""
    """The command that made it."""
    metrics: Sequence[Sequence[str]] = ()
    """Rows of a table; the first has the headings."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else was measured: sizes, errors, the hash of the data."""
    serving: Sequence[Sequence[str]] = ()
    """Rows of a table: program, whether it serves the weights, and why not or how."""
    configuration: str = ""
    """YAML, whole."""
    versions: Mapping[str, str] = field(default_factory=dict)


def render_card(card: Card) -> str:
    """The card as Markdown with the hub's header."""
    data = ModelCardData(
        base_model=card.base_model if card.base_model and _on_the_hub(card.base_model) else None,
        library_name=card.library,
        tags=["loraloom", *card.tags],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {card.title}", card.summary]
    if card.base_model:
        parts.append(f"Base model: `{card.base_model}`")
    for heading, text in (
        ("Use", _fenced("python", card.usage)),
        ("Results", table(card.metrics)),
        ("Measured", "\n".join(f"- {name}: {value}" for name, value in card.facts.items())),
        ("Serving", table(card.serving)),
        ("How it was made", _fenced("bash", card.command)),
        ("Configuration", _fenced("yaml", card.configuration)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
    ):
        if text:
            parts += [f"## {heading}", text]
    return "\n\n".join(parts) + "\n"


def write_card(card: Card, folder: Path) -> Path:
    """Writes the card as README.md of the folder, over one that is there."""
    path = folder / FILE
    write_text_atomically(path, render_card(card))
    return path


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row has the headings; "" for no rows."""
    if not rows:
        return ""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _fenced(language: str, text: str) -> str:
    if not text:
        return ""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _on_the_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()
