"""The one HTML page: what it holds, what it escapes, what it writes."""

import base64
import re
from html.parser import HTMLParser

import pytest

from kd.page import Page, open_page, subplots

EVIL = "<script>alert(1)</script>\"'&"


def figure():
    made, axes = subplots(2, 1)
    axes.plot([1, 2], [3, 4])
    return made


def filled(text):
    page = Page(text).heading(text).text(text).verdict(text).code(text)
    page.table([text], [[text]]).samples([(text, text, True)])
    return page.details(text, [text], opened=True).figure(figure(), text)


class Tags(HTMLParser):
    """Fails on a tag that is not closed, and keeps all text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.seen = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_every_text_is_escaped_and_every_tag_closed():
    read = Tags()
    read.feed(filled(EVIL).html())
    assert not read.open
    # title, h1, heading, text, verdict, code, two cells, a sample of two, summary, text, caption
    assert sum(text.count(EVIL) for text in read.texts) == 13
    assert {tag for tag, _ in read.seen}.isdisjoint({"script", "link", "iframe"})
    (picture,) = [attributes for tag, attributes in read.seen if tag == "img"]
    assert picture["alt"] == EVIL and picture["src"].startswith("data:image/png;base64,")
    assert ("details", {"open": None}) in read.seen


def test_cells_that_look_like_numbers_are_flush_right():
    cells = ["12", "+1.5 %", "-3", "−4", "", "-", "top-5", "x1", 0.25]
    html = Page("t").table(["a"], [cells]).html()
    numbers = re.findall(r'<td class="number">([^<]*)</td>', html)
    assert numbers == ["12", "+1.5 %", "-3", "−4", "0.25"]
    assert re.findall(r"<td>([^<]*)</td>", html) == ["", "-", "top-5", "x1"]


def test_the_order_of_the_parts_and_the_spaces_of_code_are_kept():
    html = Page("t").code("  a\n    b").text("one").heading("two").details("s", ["x"]).html()
    assert "<pre>  a\n    b</pre>" in html and "<details><summary>s</summary>" in html
    assert html.index("one") < html.index("two") < html.index("<details>")
    assert html.startswith("<!doctype html>") and "Python 3." in html


def test_a_named_figure_is_also_a_file_and_one_without_a_name_is_not(tmp_path):
    page = Page("t").figure(figure(), "a", "curve").figure(figure(), "b")
    path = page.save(tmp_path / "new" / "page.html")
    assert sorted(file.name for file in path.parent.iterdir()) == ["curve.png", "page.html"]
    data = re.findall(r"base64,([^\"]+)", path.read_text())
    assert len(data) == 2
    assert base64.b64decode(data[0]) == (tmp_path / "new" / "curve.png").read_bytes()


def test_half_a_character_is_replaced_and_does_not_end_the_page(tmp_path):
    text = Page("a\ud83d").save(tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<h1>a?</h1>" in text


def test_panels_come_as_an_array_and_one_panel_alone():
    assert hasattr(subplots()[1], "plot")
    assert subplots(rows=1, columns=2)[1].shape == (1, 2)
    assert subplots(rows=3, columns=2)[1].shape == (3, 2)


@pytest.fixture()
def opened(monkeypatch):
    import webbrowser

    addresses = []
    monkeypatch.setattr(webbrowser, "open", lambda address: addresses.append(address) or True)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return addresses


def test_open_never_fails_without_a_display(monkeypatch, tmp_path, opened):
    import webbrowser

    assert not open_page(tmp_path / "report.html") and not opened
    monkeypatch.setenv("DISPLAY", ":0")
    assert open_page(tmp_path / "report.html") and opened[0].startswith("file://")

    def broken(address):
        raise webbrowser.Error("no browser")

    monkeypatch.setattr(webbrowser, "open", broken)
    assert not open_page(tmp_path / "report.html")
