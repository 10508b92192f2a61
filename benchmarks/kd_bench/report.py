"""Tables of what was measured: JSON in pytest-benchmark's form, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

from kd.files import write_whole
from kd_bench import gate
from kd_bench.machine import command_line, line_of
from kd_bench.shapes import ALL_SUITES
from kd_bench.steps import is_floor

COLUMNS = (
    "suite",
    "shape",
    "dtype",
    "divergence",
    "implementation",
    "version",
    "median_s",
    "min_s",
    "spread",
    "rounds",
    "tokens_per_s",
    "x_matmuls",
    "tflops",
    "gb_per_s",
    "of_ceiling",
    "extra_mib",
    "value_error",
    "grad_error",
    "note",
)

ERRORS = {  # what the error column holds where there is no gradient
    "selection": "error of log p",
    "cache-write": "error of p",
    "cache-read": "error of p",
    "capture": "error of p",
    "recipe": "error of p",
}


def load_groups(folder: Path) -> list[dict[str, Any]]:
    """Every group's result under ``folder/groups``, suite by suite, the scaling series last."""
    paths = sorted((folder / "groups").glob("*.json"))
    suites = list(ALL_SUITES)

    def place(group: dict[str, Any]) -> tuple[bool, int]:
        row = group["rows"][0]
        return row["shape"]["name"].startswith("scaling"), suites.index(row["suite"])

    return sorted((json.loads(path.read_text()) for path in paths), key=place)


def times_floor(seconds: list[float], floor: list[float]) -> float | None:
    """Median over the rounds of time over the floor's time in the same round."""
    ratios = [a / b for a, b in zip(seconds, floor, strict=False)]
    return statistics.median(ratios) if ratios else None


def table_row(row: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """One implementation's line: time, rates against the ceilings, memory, errors."""
    found: dict[str, Any] = {
        "suite": row["suite"],
        "shape": row["shape"]["name"],
        "dtype": row["dtype"],
        "divergence": row["divergence"],
        "implementation": row["implementation"],
        "version": row["version"],
        "note": row.get("skipped") or "; ".join(filter(None, (row["note"], row.get("detail")))),
    }
    if "skipped" in row or not row["seconds"]:
        return found
    seconds, ceilings = row["seconds"], group["ceilings"]
    median = statistics.median(seconds)
    found |= {
        "median_s": median,
        "min_s": min(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "rounds": len(seconds),
        "tokens_per_s": row["shape"]["tokens"] / median if row["suite"] != "recipe" else None,
        "tflops": row["floor_flops"] / median / 1e12 if row["floor_flops"] else None,
        "gb_per_s": row["floor_bytes"] / median / 1e9 if row["floor_bytes"] else None,
        "x_matmuls": times_floor(seconds, row["floor_seconds"]),
        "of_ceiling": best_possible(row, ceilings) / median,
        "extra_mib": row["extra_memory"] / 2**20 if "extra_memory" in row else None,
        "value_error": row.get("value_error"),
        "grad_error": row.get("grad_error"),
    }
    return found


def best_possible(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Seconds that the floor's FLOPs and bytes take at the rates measured beside it."""
    flops = ceilings[f"matmul_{row['dtype']}_flops_per_second"]
    return max(row["floor_flops"] / flops, row["floor_bytes"] / ceilings["copy_bytes_per_second"])


def all_rows(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [table_row(row, group) for group in groups for row in group["rows"]]


def as_csv(groups: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in all_rows(groups):
        writer.writerow({key: _plain(value) for key, value in row.items()})
    return text.getvalue()


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def as_markdown(groups: list[dict[str, Any]]) -> str:
    """One table a group. A speed is shown with its error beside it, or not at all."""
    parts = []
    for group in groups:
        ceilings = ", ".join(_ceiling(name, value) for name, value in group["ceilings"].items())
        parts.append(
            f"### {group['group']}\n\n{line_of(group['machine'])}; {group['measured_at']}; "
            f"ceilings measured in the same run: {ceilings}. {command_of(group)}\n\n"
            + group_table(group)
        )
    return "\n\n".join(parts) + "\n"


def command_of(group: dict[str, Any]) -> str:
    """The command that measured a group, as a sentence."""
    return f"Command: `{group['command']}`." if group.get("command") else ""


def _ceiling(name: str, value: float) -> str:
    if name.startswith("copy"):
        return f"copy {value / 1e9:.1f} GB/s"
    return f"{name.split('_')[1]} matmul {value / 1e12:.3f} TFLOP/s"


def group_table(group: dict[str, Any]) -> str:
    """A Markdown table of one group, fastest first, the floor on top."""
    suite = group["rows"][0]["suite"]
    floor_name = "x bare forward" if suite == "capture" else "x matmuls"
    error_name = ERRORS.get(suite, "gradient error")
    lines = [
        f"| implementation | median s | min s | spread | tokens/s | {floor_name} | TFLOP/s | "
        f"GB/s | of the ceiling | extra MiB | value error | {error_name} | note |",
        "|---|" + "---:|" * 11 + "---|",
    ]
    rows = [table_row(row, group) for row in group["rows"]]
    rows.sort(key=lambda row: row.get("median_s") or float("inf"))
    for row in rows:
        name = row["implementation"] + (f" {row['version']}" if row["version"] else "")
        if row.get("median_s") is None:
            lines.append(f"| {name} |" + " |" * 11 + f" not measured: {row['note']} |")
            continue
        floor = is_floor(row["implementation"])
        numbers = [
            f"{row['median_s']:.4g}",
            f"{row['min_s']:.4g}",
            f"{100 * row['spread']:.0f} %",
            _number(row["tokens_per_s"], ",.0f"),
            _number(row["x_matmuls"], ".3f"),
            _number(row["tflops"], ".3f"),
            _number(row["gb_per_s"], ".2f"),
            f"{100 * row['of_ceiling']:.0f} %" if row["of_ceiling"] else "-",
            _number(row["extra_mib"], ".0f"),
            "-" if floor else f"{row['value_error']:.1e}",
            "-" if floor else f"{row['grad_error']:.1e}",
        ]
        lines.append(f"| {name} | " + " | ".join(numbers) + f" | {row['note']} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def as_pytest_benchmark(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows in pytest-benchmark's JSON, which its ``compare`` and other tools read."""
    entries = []
    for group in groups:
        for row in group["rows"]:
            if not row["seconds"]:
                continue
            name = f"{group['group']}/{row['implementation']}"
            data = {key: value for key, value in row.items() if key != "seconds"}
            entries.append(
                {
                    "group": group["group"],
                    "name": name,
                    "fullname": f"kd.bench::{name}",
                    "params": None,
                    "param": None,
                    "extra_info": {**data, "ceilings": group["ceilings"]},
                    "options": {"timer": "perf_counter"},
                    "stats": _stats(row["seconds"]),
                }
            )
    machines = [group["machine"] for group in groups]
    return {
        "machine_info": machines[-1] if machines else {},
        "commit_info": {"id": machines[-1].get("commit", "") if machines else ""},
        "benchmarks": entries,
        "datetime": max((group["measured_at"] for group in groups), default=""),
        "version": "5.1.0",
    }


def _stats(seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    mean = statistics.fmean(ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        "rounds": len(ordered),
        "median": statistics.median(ordered),
        "iqr": quartiles[2] - quartiles[0],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "iqr_outliers": 0,
        "stddev_outliers": 0,
        "outliers": "0;0",
        "ld15iqr": ordered[0],
        "hd15iqr": ordered[-1],
        "ops": 1 / mean,
        "total": sum(ordered),
        "iterations": 1,
        "data": seconds,
    }


def write_report(folder: Path, plots: bool = True) -> list[Path]:
    """results.json, results.csv, README.md and, with plots, PNGs and report.html under a folder."""
    groups = load_groups(folder)
    if not groups:
        raise ValueError(f"write_report: folder must hold results, got none under {folder}/groups.")
    head = (
        f"# Benchmarks\n\nWritten by `{command_line()}`; each group names the command that "
        "measured it. Floors and columns: benchmarks/README.md.\n\n"
    )
    written = {
        "results.json": json.dumps(as_pytest_benchmark(groups), indent=1) + "\n",
        "results.csv": as_csv(groups),
        "README.md": head + as_markdown(groups) + gate.as_markdown(folder),
    }
    paths = []
    for name, text in written.items():
        write_whole(folder / name, text.encode())
        paths.append(folder / name)
    if plots:
        from kd_bench.plots import write_plots

        paths += write_plots(folder, groups)
    return paths
