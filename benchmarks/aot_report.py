"""The gate's findings as CSV and Markdown."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "kernel", "arch", "CTAs", "registers", "spills", "shared", "CTA/SM", "bits", "SASS/el",
    "MUFU/el", "B/el", "floor",
)  # fmt: skip
KEY = """\
CTAs: thread blocks of a row's cluster. registers: a thread's. spills: bytes of stack (NVIDIA),
spilled registers (AMD). shared: bytes. CTA/SM: resident by registers and shared memory (NVIDIA).
bits: the narrowest bulk load or store. SASS/el, MUFU/el: instructions an element over every pass,
static counts. B/el: read and written an element. floor: the share of the memory floor that the
counts allow on an H100 (3.0 TB/s, 9.87 instructions and 1.23 MUFU a byte). Bounds from machine
code, not timings.
"""


def row(case: Any, arch: str, report: Any, share: float | None) -> list[str]:
    """The table's cells of one variant."""
    counts = report.clusters, report.registers, report.spills, report.shared, report.blocks
    cells = [case.name, arch, *(str(n) for n in counts), str(report.width)]
    cells += [f"{report.sass:.1f}" if report.sass else "-", f"{report.mufu:.2f}"]
    return [*cells, f"{report.bytes:g}", "" if share is None else f"{share:.0%}"]


def write(path: pathlib.Path, title: str, rows: Sequence[Sequence[str]], notes: str) -> None:
    """``path``.csv with every row, ``path``.md with the same as a table under its notes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    lines = [f"# {title}", "", KEY, notes, "", "| " + " | ".join(COLUMNS) + " |"]
    lines.append("|---|---|" + "---:|" * (len(COLUMNS) - 2))
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
