"""The page as a reader sees it, in a real headless Chromium: a phone and a desk, light and dark."""

import pytest

from loraloom.report import Report, Section
from loraloom.report.palette import DARK, LIGHT

from .browser import Browser, find_chromium
from .support import full_report, heatmap, page

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
MODES = [(390, "light"), (390, "dark"), (320, "light"), (1280, "light"), (1280, "dark")]
# Everything that sticks out of the window, apart from what scrolls within its own box.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table'))
    .map(e => [e.tagName, (e.textContent || '').slice(0, 30), e.getBoundingClientRect()])
    .filter(([, , box]) => box.width > 0 && (box.right > WIDTH + 0.5 || box.left < -0.5))
    .map(([tag, text]) => tag + ' ' + text)"""
# Words of a figure that leave its margins, or lie above or below it.
UNREADABLE = """[...document.querySelectorAll('svg.figure')].flatMap(s => {
    const style = getComputedStyle(s), box = s.getBoundingClientRect();
    const [left, right] = [box.left - parseFloat(style.marginLeft), box.right + parseFloat(style.marginRight)];
    const [top, bottom] = [box.top - parseFloat(style.marginTop), box.bottom + parseFloat(style.marginBottom)];
    return [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])
        .filter(([, b]) => b.width > 0)
        .filter(([, b]) => b.left < left - 8 || b.right > right + 8 || b.top < top - 4 || b.bottom > bottom + 4)
        .map(([text, b]) => [text, b.left - left, b.right - right, b.top - top, b.bottom - bottom])})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(full_report()), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), MODES)
def test_it_fits_and_shows_its_pictures(browser, report_page, width, scheme):
    browser.open(report_page, width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [report_page.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OUTSIDE.replace("WIDTH", str(width))) == []
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg.figure')].map(s => { const b = s.getBoundingClientRect();"
        "return [b.width, b.height, s.querySelectorAll('path, rect, circle').length] })"
    )
    assert len(boxes) == sum(section.figure is not None for section in full_report().sections)
    assert browser.evaluate(UNREADABLE) == []
    for box_width, box_height, marks in boxes:
        assert box_width >= 150
        assert box_height >= 60
        assert marks > 0
    curves = browser.evaluate("[...document.querySelectorAll('path.curve')].map(p => p.getBoundingClientRect().width)")
    assert curves
    assert min(curves) > 0
    palette = LIGHT if scheme == "light" else DARK
    colors = [palette.paper, palette.ink]
    assert browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    ) == [f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:7], 16)})" for c in colors]


def test_text_of_a_figure_keeps_its_size(browser, report_page):
    """A picture that is scaled to a phone shrinks its labels with it; these do not."""
    sizes = {}
    for width in (390, 1280):
        browser.open(report_page, width)
        heights = "[...document.querySelectorAll('svg.plot text')].map(t => t.getBBox().height)"
        sizes[width] = min(browser.evaluate(heights))
    assert sizes[390] >= 11
    assert sizes[390] >= 0.9 * sizes[1280]


def test_a_table_without_a_picture_is_not_cut(browser, report_page):
    browser.open(report_page, 390)
    cut = "[...document.querySelectorAll('.pair:not(.figured) > .scroll')].map(s => s.scrollHeight - s.clientHeight)"
    heights = browser.evaluate(cut)
    assert heights
    assert max(heights) <= 1


def test_the_table_stands_beside_its_picture_where_there_is_room(browser, report_page):
    place = """[...document.querySelectorAll('.pair.beside')].map(p => {
        const [a, b] = [...p.children].map(c => c.getBoundingClientRect()); return b.left >= a.right })"""
    browser.open(report_page, 1280)
    assert set(browser.evaluate(place)) == {True}
    browser.open(report_page, 390)
    assert set(browser.evaluate(place)) == {False}


def test_a_deep_model_fits_too(browser, tmp_path):
    columns = [f"self_attention.some_long_module_name_{i}" for i in range(14)]
    sections = [Section("Wide", figure=heatmap(80, columns=columns)), Section("Deep", figure=heatmap(126))]
    path = tmp_path / "report.html"
    path.write_text(page(Report("t", "c", sections=sections)), encoding="utf-8")
    assert path.stat().st_size < 500_000
    browser.open(path, 390)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.complaints == []
