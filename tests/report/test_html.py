"""The page: one file that asks for nothing else, small, escaped, with a table beside every picture."""

import re
from html.parser import HTMLParser

import pytest

from loraloom.report import Fact, Report, Section

from .support import HOSTILE, LONG_PATH, full_report, heatmap, page


class Reader(HTMLParser):
    """Tags with their attributes, and the text of the page without markup, styles left out."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def count(self, tag, **wanted):
        return sum(name == tag and wanted.items() <= attributes.items() for name, attributes in self.tags)


@pytest.fixture(scope="module")
def text():
    return page(full_report())


def test_it_is_well_formed_and_asks_for_nothing(text):
    reader = Reader(text)
    assert reader.open == []
    assert reader.count("script") == 0
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"#|data:|$", attributes.get(name) or ""), (tag, attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text


def test_what_the_user_wrote_stays_text(text):
    assert HOSTILE not in text
    shown = Reader(text).text
    # title, h1, fact, command, section heading, navigation, note, table heading and nine cells
    assert shown.count(HOSTILE) >= 16
    assert LONG_PATH in shown


def test_every_picture_has_a_table_and_words(text):
    reader = Reader(text)
    figures = sum(section.figure is not None for section in full_report().sections)
    assert reader.count("svg", role="img") == figures
    assert reader.count("desc") == figures
    assert reader.count("table") == figures + 3  # two of their own, and a folded one
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {name for _, attributes in reader.tags for name in (attributes.get("aria-labelledby") or "").split()}
    assert named <= set(ids)
    targets = {attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"}
    assert targets <= set(ids)
    assert targets


def test_four_facts_are_large_and_the_rest_are_there(text):
    assert text.count('<dd class="value">') == 4
    assert Reader(text).text.count("fact 2") == 1


def test_a_long_value_is_never_large():
    facts = [Fact("accuracy", "0.5"), Fact("task", "text-classification"), Fact("seeds", "3")]
    shown = page(Report("t", "c", summary=facts))
    assert shown.count('<dd class="value">') == 1
    assert Reader(shown).text.count("seeds") == 1


def test_light_and_dark_have_the_same_colors(text):
    light, dark = re.findall(r":root \{ (.*?) \}", text)
    names = [re.findall(r"--([\w-]+):", block) for block in (light, dark)]
    assert names[0] == names[1]
    assert len(names[0]) > 50
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(names[0])
    assert "prefers-color-scheme: dark" in text


def test_a_model_of_80_layers_stays_under_half_a_megabyte():
    sections = [Section(f"Amount {i}", "", heatmap(80)) for i in range(4)]
    assert len(page(Report("t", "c", sections=sections)).encode()) < 500_000


def test_a_long_table_is_thinned_and_says_so(text):
    reader = Reader(text)
    assert "One row in 2, and the last; all 400 are in report.json." in reader.text
    assert reader.count("tr") < 700
    assert "1,995" in reader.text
