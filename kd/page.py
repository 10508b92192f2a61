"""One self-contained HTML page: headings, paragraphs, verdicts, tables, figures, samples.

Every text is escaped, and the page loads nothing from anywhere. Nothing else in the project writes
HTML or draws: figures start at ``subplots``.
"""

from __future__ import annotations

import base64
import io
import os
import platform
import sys
import webbrowser
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from kd.files import write_whole

TEMPLATE = Path(__file__).with_name("page.html.j2")
COLOURS = ("#888f9c", "#3465a4", "#2e7d32", "#b3261e", "#8e44ad")


class Page:
    """Collects parts in order; ``save`` writes the page, and one PNG for each named figure.

    Every method but ``save`` returns the page, so that calls can be chained.

    Args:
        title: the page's heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[dict[str, Any]] = []
        self._pictures: dict[str, bytes] = {}

    def heading(self, text: str) -> Page:
        """The start of a section."""
        return self._add("heading", text=text)

    def text(self, text: str) -> Page:
        """A paragraph."""
        return self._add("text", text=text)

    def verdict(self, text: str) -> Page:
        """The one sentence a reader should take away."""
        return self._add("verdict", text=text)

    def code(self, text: str) -> Page:
        """Text in a fixed-width font, its lines and spaces kept."""
        return self._add("code", text=text)

    def table(self, header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Page:
        """A table; cells that look like numbers are set flush right."""
        return self._add("table", header=list(header), rows=[list(row) for row in rows])

    def samples(self, rows: Iterable[tuple[str, str, bool]]) -> Page:
        """Readable completions: (prompt, completion, right or not)."""
        return self._add("samples", rows=list(rows))

    def details(self, summary: str, texts: Iterable[str], *, opened: bool = False) -> Page:
        """Texts in a fixed-width font under a line that a click opens and closes."""
        return self._add("details", summary=summary, texts=list(texts), open=opened)

    def figure(self, figure: Any, caption: str, name: str | None = None) -> Page:
        """A matplotlib figure, inside the page; with a ``name`` also as name.png beside it."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
        if name is not None:
            self._pictures[name] = buffer.getvalue()
        data = base64.b64encode(buffer.getvalue()).decode()
        return self._add("figure", data=data, caption=caption)

    def save(self, path: str | Path) -> Path:
        """Write the page to an .html file, and its named figures beside it.

        Returns:
            The path. Folders that are missing are made; the page appears whole or not at all.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, data in self._pictures.items():
            (path.parent / f"{name}.png").write_bytes(data)
        write_whole(path, self.html().encode(errors="replace"))
        return path

    def html(self) -> str:
        """The whole page."""
        import jinja2

        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        environment.tests["numeric"] = _is_number
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        page = template.render(title=self.title, parts=self._parts, versions=versions())
        return page.lstrip() + "\n"

    def _add(self, kind: str, **fields: Any) -> Page:
        self._parts.append({"kind": kind, **fields})
        return self


def subplots(
    width: float = 6.4, height: float = 3.8, rows: int = 1, columns: int = 1
) -> tuple[Any, Any]:
    """An empty matplotlib figure and its axes, which belong to no window and no display.

    Args:
        width: of the whole figure, in inches.
        height: of the whole figure, in inches.
        rows: panels one above the other.
        columns: panels side by side.

    Returns:
        The figure, and its Axes: one where there is one panel, else an array [rows, columns].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=rows == columns == 1)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def open_page(page: str | Path) -> bool:
    """Show a page in the browser where there is a display; never fails, never waits.

    Returns:
        Whether a browser was asked to show it.
    """
    graphical = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if not graphical:  # a text browser would take over the terminal
        return False
    try:
        return webbrowser.open(Path(page).resolve().as_uri())
    except (webbrowser.Error, OSError):
        return False


def versions() -> str:
    """What the numbers were made with, on one line."""
    found = []
    for package in ("torch", "transformers", "accelerate"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}, {platform.machine()}"


def _is_number(cell: Any) -> bool:
    text = str(cell)
    return text[:1].isdigit() or (text[:1] in ("+", "-", "−") and text[1:2].isdigit())
