"""A report: Markdown-like parts to one self-contained HTML file, with its plots inside."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.files import write_whole

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2433; max-width: 46rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid #3465a4; padding: .4rem 1rem;
           background: #f2f6fb; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #dde3ec; text-align: left;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: #f6f7f9; padding: .7rem; overflow-x: auto; }
.right { color: #2e7d32; } .wrong { color: #b3261e; }
footer { color: #667; font-size: .85rem; margin-top: 3rem; }
"""


class Report:
    """Collects parts in order; ``save`` writes ``report.html`` and one PNG per plot.

    Args:
        title: the page's heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._plots: list[tuple[str, bytes]] = []

    def heading(self, text: str) -> Report:
        return self._add(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> Report:
        """A paragraph."""
        return self._add(f"<p>{html.escape(text)}</p>")

    def verdict(self, text: str) -> Report:
        """The one sentence a reader should take away."""
        return self._add(f'<p class="verdict">{html.escape(text)}</p>')

    def code(self, text: str) -> Report:
        return self._add(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Report:
        """A table; cells that look like numbers are set flush right."""
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
        return self._add(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def samples(self, rows: Sequence[tuple[str, str, bool]]) -> Report:
        """Readable completions: (prompt, completion, right or not)."""
        lines = []
        for prompt, completion, right in rows:
            mark = ("right", "right") if right else ("wrong", "wrong")
            lines.append(
                f"<pre>{html.escape(prompt)}{html.escape(completion)}   "
                f'<span class="{mark[0]}">{mark[1]}</span></pre>'
            )
        return self._add("".join(lines))

    def plot(self, figure: Any, name: str, caption: str) -> Report:
        """A matplotlib figure, inside the page and as ``name``.png beside it."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
        self._plots.append((name, buffer.getvalue()))
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = html.escape(caption, quote=True)
        return self._add(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def save(self, folder: str | Path) -> Path:
        """Write the page and its plots; returns the page's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._plots:
            (folder / f"{name}.png").write_bytes(data)
        page = folder / "report.html"
        write_whole(page, self._page().encode())
        return page

    def _add(self, part: str) -> Report:
        self._parts.append(part)
        return self

    def _page(self) -> str:
        title = html.escape(self.title)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{title}</title><style>{STYLE}</style></head>"
            f"<body><h1>{title}</h1>{''.join(self._parts)}<footer>{html.escape(versions())}"
            "</footer></body></html>\n"
        )


def open_page(page: str | Path) -> bool:
    """Show a page in the browser where there is a display; never fails, never waits.

    Returns:
        Whether a browser was asked to show it.
    """
    import sys
    import webbrowser

    graphical = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if not graphical:  # a text browser would take over the terminal
        return False
    try:
        return webbrowser.open(Path(page).resolve().as_uri())
    except (webbrowser.Error, OSError):
        return False


def _cell(value: Any) -> str:
    text = str(value)
    number = text[:1].isdigit() or (text[:1] in "+-−" and text[1:2].isdigit())
    return (
        f'<td class="number">{html.escape(text)}</td>'
        if number
        else (f"<td>{html.escape(text)}</td>")
    )


def versions() -> str:
    """What the numbers were made with, on one line."""
    import platform
    from importlib import metadata

    found = []
    for package in ("torch", "transformers", "accelerate"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}, {platform.machine()}"
