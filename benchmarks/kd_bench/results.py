"""What was measured on a device: results.json in pytest-benchmark's form, and tables of it.

``results.json`` is rewritten after every row, whole or not at all, so that a run that was stopped
continues. Beside pytest-benchmark's fields it has ``not_measured``: rows without a time, and why.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest_benchmark

from kd.files import write_json, write_whole
from kd_bench import machine, tables

UNFINISHED = "did not finish: out of memory, killed, or past the time limit"
COLUMNS = (
    "suite", "shape", "dtype", "divergence", "implementation", "version", "median_s", "min_s",
    "spread", "rounds", "tokens_per_s", "relative_to_bare", "tflops", "gb_per_s", "of_ceiling",
    "extra_mib", "value_error", "grad_error", "note",
)  # fmt: skip
NUMBERS = {  # of COLUMNS, what the Markdown tables show: title and form
    "median_s": ("median s", ".4g"),
    "min_s": ("min s", ".4g"),
    "spread": ("spread", ".0%"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "relative_to_bare": ("relative to {bare}", ".3f"),
    "tflops": ("TFLOP/s", ".3f"),
    "gb_per_s": ("GB/s", ".2f"),
    "of_ceiling": ("of the ceiling", ".0%"),
    "extra_mib": ("extra MiB", ".0f"),
    "value_error": ("value error", ".1e"),
    "grad_error": ("{error}", ".1e"),
}


class Results:
    """The rows of one device's folder, by name.

    Args:
        folder: where ``results.json`` lies or will lie.
        fresh: rows are measured again and replaced.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.path, self.fresh, self.new = folder / "results.json", fresh, set[str]()
        held = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.machine: dict[str, Any] = held.get("machine_info", {})
        rows = [*held.get("benchmarks", ()), *held.get("not_measured", ())]
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in rows}

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Rows with times, pytest-benchmark's "benchmarks"."""
        return [row for row in self.rows.values() if "reason" not in row]

    def has(self, name: str) -> bool:
        """Whether a rerun leaves a row alone: it was measured, or ended the run."""
        if self.fresh and name not in self.new:
            return False
        return name in self.rows and self.rows[name].get("reason", UNFINISHED) == UNFINISHED

    def put(self, row: dict[str, Any]) -> None:
        """Keep a row, in the place of its last one; without times it has a ``reason``."""
        self.new.add(row["name"])
        self.rows[row["name"]] = row
        stamps = (r["extra_info"]["measured_at"] for r in self.measured)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {
            "machine_info": self.machine,
            "commit_info": {"id": self.machine.get("commit", "")},
            "benchmarks": self.measured,
            "not_measured": [r for r in self.rows.values() if "reason" in r],
            "datetime": max(stamps, default=""),
            "version": pytest_benchmark.__version__,
        })  # fmt: skip

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by group, in the order of their first one; scaling series last."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows.values():
            found.setdefault(row["group"], []).append(row)
        return dict(sorted(found.items(), key=lambda item: "/scaling:" in item[0]))


def measured_row(stats: dict[str, Any], info: dict[str, Any], command: str) -> dict[str, Any]:
    """pytest-benchmark's dictionary of a row, with its machine, command and time."""
    name = f"{stats['group']}/{stats['extra_info']['implementation']}"
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    extra = {"machine": machine.line_of(info), "command": command, "measured_at": stamp}
    stats |= {"name": name, "fullname": name, "params": None, "param": None}
    return stats | {"extra_info": stats["extra_info"] | extra}


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """One implementation's cells by ``COLUMNS``: time, rates, memory, errors."""
    if "reason" in row:
        suite, shape, dtype, divergence = row["group"].split("/", 3)
        found = {"suite": suite, "shape": shape, "dtype": dtype, "divergence": divergence}
        kept = {"implementation": row["implementation"], "version": row["version"]}
        return found | kept | {"note": row["reason"]}
    extra, seconds = row["extra_info"], row["stats"]["data"]
    median = statistics.median(seconds)
    ratios = [a / b for a, b in zip(seconds, extra["bare_seconds"], strict=False)]
    copied = ("suite", "dtype", "divergence", "implementation", "version", "note")
    memory = extra.get("extra_memory")
    return {
        **{key: extra[key] for key in copied},
        "shape": extra["shape"]["name"],
        "median_s": median,
        "min_s": min(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "rounds": len(seconds),
        "tokens_per_s": extra["shape"]["tokens"] / median,
        "relative_to_bare": statistics.median(ratios) if ratios else None,
        "tflops": extra["least_flops"] / median / 1e12 or None,
        "gb_per_s": extra["least_bytes"] / median / 1e9 or None,
        "of_ceiling": best_possible(extra) / median or None,
        "extra_mib": None if memory is None else memory / 2**20,
        "value_error": extra.get("value_error"),
        "grad_error": extra.get("grad_error"),
    }


def best_possible(extra: dict[str, Any]) -> float:
    """Roofline: seconds that the least FLOPs and bytes take at the rates measured beside them."""
    flops = extra["ceilings"][f"matmul_{extra['dtype']}_flops_per_second"]
    copied = extra["ceilings"]["copy_bytes_per_second"]
    return max(extra["least_flops"] / flops, extra["least_bytes"] / copied)


def group_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of one group, fastest first. No speed stands without its error."""
    extra = next((row["extra_info"] for row in rows if "extra_info" in row), {})
    titles = {"bare": extra.get("bare_name") or "bare GEMM"}
    titles["error"] = extra.get("error_name") or "gradient error"
    shown = sorted(map(table_row, rows), key=lambda cells: cells.get("median_s") or float("inf"))
    lines = []
    for cells in shown:
        name = f"{cells['implementation']} {cells.get('version') or ''}".strip()
        if "median_s" not in cells:
            lines.append([name, *[""] * len(NUMBERS), f"not measured: {cells['note']}"])
            continue
        numbers = [
            "-" if cells[key] is None else format(cells[key], form)
            for key, (_, form) in NUMBERS.items()
        ]
        lines.append([name, *numbers, cells["note"]])
    columns = [title.format(**titles) for title, _ in NUMBERS.values()]
    return tables.markdown(["implementation", *columns, "note"], lines, text=["note"])


def group_head(name: str, rows: list[dict[str, Any]]) -> str:
    """A group's title, and where its numbers come from."""
    found = [row["extra_info"] for row in rows if "extra_info" in row]
    if not found:
        return f"### {name}"
    lines = [f"### {name}", "", *dict.fromkeys(extra["machine"] for extra in found)]
    stamps = sorted(extra["measured_at"] for extra in found)
    lines[-1] += f"; {' to '.join(dict.fromkeys((stamps[0], stamps[-1])))}; ceilings measured in "
    rates = found[-1]["ceilings"].items()
    lines[-1] += "the same run: " + ", ".join(ceiling(key, value) for key, value in rates) + "."
    commands = dict.fromkeys(extra["command"] for extra in found if extra["command"])
    if commands:
        lines[-1] += " Command: " + ", ".join(f"`{command}`" for command in commands) + "."
    return "\n".join(lines)


def ceiling(name: str, value: float) -> str:
    if name.startswith("copy"):
        return f"copy {value / 1e9:.1f} GB/s"
    return f"{name.split('_')[1]} matmul {value / 1e12:.3f} TFLOP/s"


def write_report(folder: Path) -> list[Path]:
    """README.md, results.csv and plots beside a folder's results.json; the paths written.

    Raises:
        ValueError: nothing was measured there.
    """
    results = Results(folder)
    if not results.rows:
        raise ValueError(f"write_report: {folder} holds no results.json with results.")
    groups = results.groups()
    cells = [table_row(row) for rows in groups.values() for row in rows]
    csv = tables.comma_separated(COLUMNS, [[c.get(name) for name in COLUMNS] for c in cells])
    write_whole(folder / "results.csv", csv.encode())
    plots = draw(folder / "plots", results.measured)
    parts = [
        "# Benchmarks\n\nEach group names the command that measured it; columns and method: "
        "benchmarks/README.md. What the kernels compile to without a GPU: "
        "[machine code](../aot/README.md). Plotted: [time beside the peers](plots/time.png).",
        *(f"![{path.stem}](plots/{path.name})" for path in plots if path.stem != "time"),
        *(f"{group_head(name, rows)}\n\n{group_table(rows)}" for name, rows in groups.items()),
    ]
    write_whole(folder / "README.md", ("\n\n".join(parts) + "\n").encode())
    return [folder / "README.md", folder / "results.csv", *plots]


def draw(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The plots; none where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from kd_bench.plots import write_plots

    return write_plots(folder, rows)
