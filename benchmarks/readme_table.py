"""The README's tables: benchmarks from the committed results, divergences from their registry.

    python benchmarks/readme_table.py            # print it
    python benchmarks/readme_table.py --write    # put them between the README's markers

Every number names the device it was measured on; devices nobody has measured say so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kd.losses.divergences import DEFINITIONS
from kd_bench import tables
from kd_bench.results import Results, table_row

ROOT = Path(__file__).parents[1]
MARK = "<!-- {}: {} -->"
UNMEASURED = "not measured yet; run `make bench-gpu`"
WHO = {  # who is shown, and the implementations of theirs of which the fastest counts
    "kd": ("kd",),
    "PyTorch": ("pytorch",),
    "torch.compile": ("pytorch compiled",),
    "Liger": ("liger chunked", "liger chunked compiled", "liger fused linear jsd", "liger jsd"),
    "TRL": ("trl gkd", "trl chunked"),
}
SHOWN = {
    "cpu": {
        "linear/qwen2.5-0.5b<-1.5b/float32/forward_kl": "fused linear KL, float32",
        "linear/qwen2.5-0.5b<-1.5b/bfloat16/forward_kl": "fused linear KL, bfloat16",
        "linear/narrow-heads/float32/forward_kl": "fused linear KL, narrow heads, float32",
        "dense/qwen2.5-0.5b<-1.5b/float32/forward_kl": "KL of two logit tensors, float32",
    },
    "cuda": {
        "linear/qwen2.5-0.5b<-1.5b/bfloat16/forward_kl": "fused linear KL, 0.5B <- 1.5B",
        "linear/qwen2.5-7b<-r1-distill-32b/bfloat16/forward_kl": "fused linear KL, 7B <- 32B",
        "linear/llama3-8b<-70b/bfloat16/forward_kl": "fused linear KL, Llama 8B <- 70B",
        "dense/qwen2.5-0.5b<-1.5b:N=2048/bfloat16/forward_kl": "KL of two logit tensors",
    },
}


def cells_of(rows: list[dict[str, Any]]) -> list[str]:
    """Ours and the others, each by its fastest way; nothing where ours has no time."""
    found: dict[str, dict[str, Any]] = {}
    for made in map(table_row, rows):
        if made.get("median_s") is None or made["grad_error"] is None:
            continue  # no speed without its error
        for who, names in WHO.items():
            fastest = found.get(who, {}).get("median_s", float("inf"))
            if made["implementation"] in names and made["median_s"] < fastest:
                found[who] = made
    if "kd" not in found:
        return []
    return [
        f"{row['median_s']:.3g} s, {row['extra_mib']:,.0f} MiB, {row['grad_error']:.0e}"
        if (row := found.get(who))
        else "-"
        for who in WHO
    ]


def device_section(folder: Path, kind: str, gpu_is_measured: bool) -> str:
    """A device's table; nothing where none of the shown groups was measured."""
    groups, lines, extra = Results(folder).groups(), [], {}
    for name, title in SHOWN[kind].items():
        cells = cells_of(groups.get(name, []))
        if cells:
            more = [] if gpu_is_measured else [UNMEASURED]
            lines.append([title, f"**{cells[0]}**", *cells[1:], *more])
            extra = extra or groups[name][0]["extra_info"]
    if not lines:
        return ""
    columns = ["forward + backward", *WHO, *([] if gpu_is_measured else ["on a GPU"])]
    return (
        "Median time, memory above inputs and gradients, gradient error against a float64 oracle; "
        f"{extra['machine']}, {extra['measured_at'][:10]} ([every row, how it is measured]"
        f"(benchmarks/results/{folder.name}/README.md)):\n\n"
        + tables.markdown(columns, lines, text=columns)
    )


def table(results: Path) -> str:
    """The README's section."""
    kinds = {}
    for path in sorted(results.glob("*/results.json")):
        kinds[path.parent] = Results(path.parent).machine["kind"]
    gpu = "cuda" in kinds.values()
    sections = [device_section(folder, kind, gpu) for folder, kind in kinds.items()]
    return "\n\n".join(section for section in sections if section)


def divergences() -> str:
    """The README's table of divergences."""
    rows = []
    for name, definition in DEFINITIONS.items():
        called = f"({', '.join(definition.parameters)})" if definition.parameters else ""
        rows.append([f"`kd.{name}{called}`", definition.formula, definition.source])
    columns = ["name", "definition (p teacher, q student)", "source"]
    return tables.markdown(columns, rows, text=columns)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail when the README is not current")
    args = parser.parse_args(argv)
    made = {"benchmarks": table(args.results), "divergences": divergences()}
    if not args.write and not args.check:
        print("\n\n".join(made.values()))
        return 0
    current = wanted = args.readme.read_text(encoding="utf-8")
    for name, section in made.items():
        marks = MARK.format(name, "begin"), MARK.format(name, "end")
        wanted = tables.put_between(args.readme, wanted, *marks, section)
    if args.check:
        print("current" if current == wanted else "not current: run readme_table.py --write")
        return int(current != wanted)
    args.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
