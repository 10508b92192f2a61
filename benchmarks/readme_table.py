"""The README's benchmark table, made from the committed results and from nothing else.

    python benchmarks/readme_table.py            # print it
    python benchmarks/readme_table.py --write    # put it between the README's two markers

Every number names the device it was measured on; devices nobody has measured say so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kd.bench.machine import line_of
from kd.bench.report import load_groups, table_row
from kd.bench.steps import is_floor

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
UNMEASURED = "not measured yet; run `make bench-gpu`"
SHOWN = (
    ("linear/qwen2.5-0.5b<-1.5b/float32/forward_kl", "fused linear KL, float32"),
    ("linear/qwen2.5-0.5b<-1.5b/bfloat16/forward_kl", "fused linear KL, bfloat16"),
    ("linear/narrow-heads/float32/forward_kl", "fused linear KL, heads of 128 and 256, float32"),
    ("dense/qwen2.5-0.5b<-1.5b/float32/forward_kl", "KL of two logit tensors, float32"),
    ("dense/qwen2.5-0.5b<-1.5b/float32/jsd(0.5)", "JSD of two logit tensors, float32"),
)


def lines_for(group: dict, title: str) -> list[str]:
    """One line an implementation, fastest first."""
    rows = [table_row(row, group) for row in group["rows"]]
    rows = [r for r in rows if r.get("median_s") and not is_floor(r["implementation"])]
    lines = []
    for row in sorted(rows, key=lambda r: r["median_s"]):
        name = f"{row['implementation']} {row['version'] or ''}".strip()
        name = f"**{name}**" if row["implementation"].startswith("kd") else name
        times = "-" if row["x_matmuls"] is None else f"{row['x_matmuls']:.2f}"
        lines.append(
            f"| {title} | {name} | {row['median_s']:.2f} | {times} | {row['extra_mib']:.0f} | "
            f"{row['grad_error']:.0e} |"
        )
        title = ""
    return lines


def device_section(folder: Path) -> str:
    groups = {group["group"]: group for group in load_groups(folder)}
    lines = []
    for name, title in SHOWN:
        if name in groups:
            lines += lines_for(groups[name], title)
    if not lines:
        return ""
    head = next(iter(groups.values()))
    return "\n".join(
        [
            f"{line_of(head['machine'])}, {head['measured_at'][:10]} "
            f"([all tables](benchmarks/results/{folder.name}/README.md)):",
            "",
            "| what | who | seconds | x bare matmuls | extra MiB | gradient error |",
            "|---|---|---:|---:|---:|---:|",
            *lines,
        ]
    )


def table(results: Path) -> str:
    """The README's section."""
    folders = sorted(path for path in results.glob("*") if (path / "groups").is_dir())
    sections = [section for folder in folders if (section := device_section(folder))]
    kinds = {group["machine"]["kind"] for folder in folders for group in load_groups(folder)}
    if "cuda" not in kinds:
        sections.append(f"On a GPU: {UNMEASURED}.")
    return "\n\n".join(sections)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail when the README is not current")
    args = parser.parse_args(argv)
    made = table(args.results)
    if not args.write and not args.check:
        print(made)
        return 0
    text = args.readme.read_text()
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        print(f"readme_table: {args.readme} must hold {BEGIN} and {END}. Add them.")
        return 1
    wanted = f"{before}{BEGIN}\n{made}\n{END}{after}"
    if args.check:
        print("current" if wanted == text else "not current: run readme_table.py --write")
        return 0 if wanted == text else 1
    args.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
