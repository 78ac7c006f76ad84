"""What a model answers: which classes it confuses, its surest mistakes, what it writes, and what it learned from."""

from typing import TYPE_CHECKING

from loraloom.report.model import Bars, Cell, Heatmap, Section, Table

if TYPE_CHECKING:
    from loraloom.training.result import RunResult

CLASSES = 24  # of a confusion matrix and of the bars; with more, the largest are listed
LONGEST = 200  # characters of a text


def answer_sections(result: "RunResult") -> list[Section]:
    """The sections that the result has something for."""
    sections = []
    if result.confusion is not None:
        sections.append(_confusion(result.label_names, result.confusion))
    if result.examples:
        written = "after" in result.examples[0]
        sections.append(_generations(result) if written else _mistakes(result))
    if result.data and result.data["classes"]:
        sections.append(_classes(result))
    return sections


def _confusion(names: list[str], matrix: list[list[int]]) -> Section:
    title = "Which classes it confuses"
    if len(names) <= CLASSES:
        values: list[list[float | None]] = [[float(count) for count in row] for row in matrix]
        note = "Test rows by their label and the answer; right ones are on the diagonal."
        return Section(title, note, Heatmap("label", "answer", names, names, values, "rows", low=0.0))
    pairs = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
    rows: list[list[Cell]] = [[names[i], names[j], count] for count, i, j in sorted(pairs, reverse=True)[:CLASSES]]
    note = f"The most frequent of {len(pairs)} pairs of {len(names)} classes, on the test set."
    return Section(title, note, table=Table(["label", "answer", "rows"], rows))


def _mistakes(result: "RunResult") -> Section:
    texts = [name for name in ("text", "text_pair") if name in result.examples[0]]
    rows: list[list[Cell]] = [
        [*(cut(example[name]) for name in texts), *(example[name] for name in ("label", "answer", "probability"))]
        for example in result.examples
    ]
    heads = [name.replace("_", " ") for name in texts] + ["label", "answer", "probability"]
    if not texts:  # images
        heads = ["row", *heads]
        rows = [[example["row"], *row] for example, row in zip(result.examples, rows, strict=True)]
    note = "Wrong answers on the test set, the surest first."
    return Section("Mistakes", note, table=Table(heads, rows))


def _generations(result: "RunResult") -> Section:
    keys = ("prompt", "expected", "before", "after")
    rows: list[list[Cell]] = [[cut(example[key]) for key in keys] for example in result.examples]
    note = "Test rows, answered greedily before and after training."
    return Section("What it writes", note, table=Table(["prompt", "expected", "before training", "after"], rows))


def _classes(result: "RunResult") -> Section:
    counts, share = result.data["classes"], result.data["majority_share"]
    shown = dict(list(counts.items())[:CLASSES])
    more = f" The {CLASSES} most frequent of {len(counts)}." if len(counts) > CLASSES else ""
    always = "" if share is None else f" Always answering the first is right on {share:.1%} of the test rows."
    return Section(
        "Classes", f"Training rows by label.{more}{always}", Bars("training rows", [*shown], [*shown.values()])
    )


def cut(text: object) -> str:
    """A text in one line, its beginning if it is long."""
    words = " ".join(str(text).split())
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"
