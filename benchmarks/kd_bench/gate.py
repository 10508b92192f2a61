"""The ahead-of-time gate's results as a section of the report: what `make aot` has counted.

Read from the folder ``aot`` beside the results, where there is one: ``table.csv`` (ours),
``peers.md`` (operations summed, theirs beside ours) and ``peers.csv``.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

ARCH, VOCAB = "sm_90", 128_256
FAMILY = re.compile(r"^(?:(?:shard|head|select) \w+|\w+)")
INTRODUCTION = f"""\
No kernel here was run: Triton compiled each for GPUs that are not in this machine, and its machine
code was counted (`make aot`). Below, {ARCH}. Spills are bytes of stack; SASS/el and B/el are
instructions and bytes an element over every pass; the bound is the least bytes an element that take
as long as the slowest of bytes, instructions and special functions, so the ratio of two bounds is
the ratio of two best times."""


def gate_folder(results: Path) -> Path | None:
    """The gate's results beside a folder of measurements; None where there are none."""
    found = results.resolve().parent / "aot"
    return found if (found / "table.csv").exists() else None


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["arch"] == ARCH]


def _range(rows: list[dict[str, str]], column: str) -> str:
    values = sorted({float(row[column]) for row in rows if row[column]})
    if not values:
        return "-"
    low, high = f"{values[0]:g}", f"{values[-1]:g}"
    return low if low == high else f"{low} to {high}"


def families(folder: Path) -> str:
    """Ours, a line a family of kernels: extremes over its variants."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in _rows(folder / "table.csv"):
        match = FAMILY.match(row["kernel"])
        groups.setdefault(match.group(0) if match else row["kernel"], []).append(row)
    lines = [
        "| kernels | variants | registers, most | spills, most | SASS/el | MUFU/el | B/el | "
        "of the floor, least |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rows in groups.items():
        most = [max(int(row[column] or 0) for row in rows) for column in ("registers", "spills")]
        shares = [float(row["floor"].rstrip("%")) for row in rows if row["floor"]]
        cells = [name, len(rows), *most, _range(rows, "SASS/el"), _range(rows, "MUFU/el")]
        cells += [_range(rows, "B/el"), f"{min(shares):g} %" if shares else "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def operations(folder: Path) -> str:
    """The first table of peers.md: whole operations, ours and theirs, with their bounds."""
    path = folder / "peers.md"
    lines: list[str] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    return "\n".join(lines)


def kernels(folder: Path) -> str:
    """Single kernels at one vocabulary, theirs beside ours."""
    columns = ("registers", "spills", "CTA/SM", "SASS/el", "MUFU/el", "B/el")
    lines = ["| kernel | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in _rows(folder / "peers.csv"):
        if str(VOCAB) in row["kernel"] or row["kernel"].startswith("trl"):
            lines.append(f"| {row['kernel']} | " + " | ".join(row[c] for c in columns) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def section(results: Path) -> list[tuple[str, str]]:
    """[(title, Markdown table)] of the gate, empty where it was not run beside ``results``."""
    folder = gate_folder(results)
    if folder is None:
        return []
    parts = [
        ("Ours, by family", families(folder)),
        ("Whole operations, ours beside theirs", operations(folder)),
        ("Single kernels, ours beside theirs", kernels(folder)),
    ]
    return [(title, table) for title, table in parts if table]


def as_markdown(results: Path) -> str:
    """The section for a report in Markdown, with links to the gate's own tables; or nothing."""
    parts = section(results)
    if not parts:
        return ""
    links = (
        "[summary](../aot/README.md), [every variant](../aot/table.md), [peers](../aot/peers.md)"
    )
    head = f"## Machine code of the kernels\n\n{INTRODUCTION}\n\nAll of it: {links}.\n\n"
    return "\n" + head + "\n\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n"
