"""The README's benchmark table, made from the committed results and from nothing else.

    python benchmarks/readme_table.py            # print it
    python benchmarks/readme_table.py --write    # put it between the README's two markers

Every number names the device it was measured on; devices nobody has measured say so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kd_bench.machine import line_of
from kd_bench.report import load_groups, table_row

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
UNMEASURED = "not measured yet; run `make bench-gpu`"
COMMAND = "python benchmarks/bench_losses.py"  # of groups from before a group named its own
WHO = {  # who is shown, and the implementations of theirs of which the fastest counts
    "kd": ("kd",),
    "PyTorch": ("pytorch",),
    "torch.compile": ("pytorch compiled",),
    "Liger": ("liger chunked", "liger chunked compiled", "liger fused linear jsd", "liger jsd"),
    "TRL": ("trl gkd", "trl chunked"),
}
SHOWN = (
    ("linear/qwen2.5-0.5b<-1.5b/float32/forward_kl", "fused linear KL, float32"),
    ("linear/qwen2.5-0.5b<-1.5b/bfloat16/forward_kl", "fused linear KL, bfloat16"),
    ("linear/narrow-heads/float32/forward_kl", "fused linear KL, narrow heads, float32"),
    ("dense/qwen2.5-0.5b<-1.5b/float32/forward_kl", "KL of two logit tensors, float32"),
)
SHOWN_GPU = (
    ("linear/qwen2.5-0.5b<-1.5b/bfloat16/forward_kl", "fused linear KL, 0.5B <- 1.5B"),
    ("linear/qwen2.5-7b<-r1-distill-32b/bfloat16/forward_kl", "fused linear KL, 7B <- 32B"),
    ("linear/llama3-8b<-70b/bfloat16/forward_kl", "fused linear KL, Llama 8B <- 70B"),
    ("dense/qwen2.5-0.5b<-1.5b:N=2048/bfloat16/forward_kl", "KL of two logit tensors"),
)


def line_for(group: dict, title: str, more: str) -> str:
    """One line: ours and the others, each by its fastest way; a speed never without its error."""
    found: dict[str, dict] = {}
    for row in group["rows"]:
        made = table_row(row, group)
        who = next((who for who, names in WHO.items() if made["implementation"] in names), None)
        if who is None or made.get("median_s") is None or made["grad_error"] is None:
            continue
        if who not in found or made["median_s"] < found[who]["median_s"]:
            found[who] = made
    if "kd" not in found:
        return ""
    cells = [cell(found.get(who)) for who in WHO]
    cells[0] = f"**{cells[0]}**"
    return f"| {title} | " + " | ".join(cells) + f" |{more}"


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['median_s']:.3g} s, {row['extra_mib']:,.0f} MiB, {row['grad_error']:.0e}"


def device_section(folder: Path, gpu_is_measured: bool) -> str:
    groups = {group["group"]: group for group in load_groups(folder)}
    more = "" if gpu_is_measured else f" {UNMEASURED} |"
    made = [
        line_for(groups[name], title, more)
        for name, title in (SHOWN_GPU if is_gpu(groups) else SHOWN)
        if name in groups
    ]
    lines = [line for line in made if line]
    if not lines:
        return ""
    first = groups[next(n for n in groups if n in dict((*SHOWN, *SHOWN_GPU)))]
    head = " | ".join(["forward + backward", *WHO, *(() if gpu_is_measured else ("on a GPU",))])
    columns = 1 + len(WHO) + (not gpu_is_measured)
    return "\n".join(
        [
            f"Median time, memory above inputs and gradients, gradient error against a float64 "
            f"oracle; {line_of(first['machine'])}, {first['measured_at'][:10]} "
            f"(`{first.get('command', COMMAND)}`; [every row, how it is measured]"
            f"(benchmarks/results/{folder.name}/README.md)):",
            "",
            f"| {head} |",
            "|---|" + "---|" * (columns - 1),
            *lines,
        ]
    )


def is_gpu(groups: dict[str, dict]) -> bool:
    return any(group["machine"]["kind"] == "cuda" for group in groups.values())


def table(results: Path) -> str:
    """The README's section."""
    folders = sorted(path for path in results.glob("*") if (path / "groups").is_dir())
    kinds = {group["machine"]["kind"] for folder in folders for group in load_groups(folder)}
    sections = [device_section(folder, "cuda" in kinds) for folder in folders]
    return "\n\n".join(section for section in sections if section)


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
