"""From a `Report` to files: report.json, report.html, and a PNG of every figure."""

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loraloom.io.files import write_text_atomically
from loraloom.provenance import installed_versions
from loraloom.report.model import Report

JSON, PAGE = "report.json", "report.html"
SCHEMA_VERSION = 1
INSTALL = "pip install 'loraloom[report]'"


@dataclass(frozen=True)
class Written:
    """What `write_report` left in the folder."""

    data: Path
    page: Path | None
    """None without jinja2."""
    pictures: list[Path]
    """Empty without resvg-py."""
    missing: str = ""
    """What could not be drawn and how to install it, in one line; empty if nothing is missing."""


def write_report(report: Report, directory: str | Path) -> Written:
    """Write report.json first, then what renders it; each file appears whole or not at all.

    Args:
        report: `created` and `versions` are filled in where empty, with now and with what is installed.
        directory: made if it is not there. PNGs that an earlier report left in it are removed.

    Raises:
        ValueError: the report holds a number that is not finite.
        OSError: the folder cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    report = dataclasses.replace(
        report,
        created=report.created or datetime.now(UTC).isoformat(timespec="seconds"),
        versions=report.versions or installed_versions(),
    )
    data = directory / JSON
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(report)}
    write_text_atomically(data, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    page, pictures, missing = None, [], []
    try:
        from loraloom.report.html import render_html

        page = directory / PAGE
        write_text_atomically(page, render_html(report))
    except ModuleNotFoundError as error:
        page, missing = None, [_missing("the page", error)]
    try:
        from loraloom.report.png import write_pictures

        pictures = write_pictures(report, directory)
    except ModuleNotFoundError as error:
        missing.append(_missing("the pictures for model cards", error))
    return Written(data, page, pictures, "; ".join(missing))


def _missing(what: str, error: ModuleNotFoundError) -> str:
    package = str(error.name).partition(".")[0]
    if package not in ("jinja2", "markupsafe", "resvg_py"):
        raise error
    return f"{what} need{'s' if what == 'the page' else ''} {package.replace('_', '-')}: {INSTALL}"
