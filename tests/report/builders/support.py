"""What every report must be, whatever it is of."""

import dataclasses
import json

from ..support import page


def sections(report):
    """By title; the report is also JSON, and a page with all of them."""
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    assert page(report).count("<section") == len(report.sections)
    return {section.title: section for section in report.sections}
