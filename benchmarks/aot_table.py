"""Compile every kernel variant for GPUs that are not here, and table what the machine code says.

python benchmarks/aot_table.py                 # every variant (make aot)
python benchmarks/aot_table.py --subset        # the ones the test suite checks
python benchmarks/aot_table.py --check FILE    # fail where a variant exceeds its budget
python benchmarks/aot_table.py --record FILE   # write budgets from what is found
python benchmarks/aot_table.py --peers DIR     # peers' kernels beside ours (aot_peers.py)
python benchmarks/aot_table.py --write FILE    # the table as FILE.csv and FILE.md too
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import triton  # noqa: E402

from aot_cases import Case, cases  # noqa: E402
from aot_machine import ARCHES, Report, cost, measure  # noqa: E402
from kd_bench import tables  # noqa: E402

COLUMNS = (
    "kernel", "arch", "CTAs", "registers", "spills", "shared", "CTA/SM", "bits", "SASS/el",
    "MUFU/el", "B/el", "roofline",
)  # fmt: skip
KEY = """\
CTAs: thread blocks of a row's cluster. registers: a thread's. spills: bytes of stack (NVIDIA),
spilled registers (AMD). shared: bytes. CTA/SM: resident by registers and shared memory (NVIDIA).
bits: the narrowest bulk load or store. SASS/el, MUFU/el: instructions an element over every pass,
static counts. B/el: read and written an element. roofline: the share of the memory roofline that
the counts allow on an H100 (3.0 TB/s, 9.87 instructions and 1.23 MUFU a byte). Bounds from machine
code, not timings."""


def fingerprint() -> str:
    """Hash of everything that decides the machine code."""
    files = sorted((ROOT / "kernels" / "kd_kernels").glob("*.py"))
    files += sorted(pathlib.Path(__file__).parent.glob("aot_*.py"))
    content = b"".join(f.read_bytes() for f in files) + triton.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def reports(
    wanted: list[tuple[Case, str]], cache: pathlib.Path, *, lenient: bool = False
) -> dict[str, Report]:
    """Every case on every arch, from the cache where the sources have not changed.

    lenient: what does not compile is left out, and not an error.
    """
    mark, stored = fingerprint(), {}
    if cache.exists():
        held = json.loads(cache.read_text())
        stored = held["reports"] if held["fingerprint"] == mark else {}

    def keep() -> None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({"fingerprint": mark, "reports": stored}))

    for count, (case, arch) in enumerate(wanted):
        if count % 50 == 0:
            keep()
        if f"{case.name} {arch}" not in stored:
            try:
                stored[f"{case.name} {arch}"] = dataclasses.asdict(measure(case, arch))
            except Exception:
                if not lenient:
                    raise
    keep()
    names = (f"{case.name} {arch}" for case, arch in wanted)
    return {name: Report(**stored[name]) for name in names if name in stored}


def faults(case: Case, arch: str, report: Report, budget: dict[str, float] | None) -> list[str]:
    """What is wrong with a variant: rules for all, then its own recorded budget."""
    wrong = []
    if report.spills:
        wrong.append(f"{report.spills} spills")
    if case.aligned and report.width < 128:
        wrong.append(f"{report.width}-bit bulk access")
    if case.bounded and arch == "sm_90" and report.sass > 9.8 * report.bytes:
        wrong.append(
            f"{report.sass:.1f} SASS/element at {report.bytes:g} bytes is not memory-bound"
        )
    for key, slack in (("registers", 0), ("sass", 0.5), ("mufu", 0.05)):
        if budget and getattr(report, key) > budget[key] + slack:
            wrong.append(f"{key} {getattr(report, key):.1f} exceeds its budget {budget[key]:.1f}")
    return wrong


def cells(case: Case, arch: str, report: Report, shown: bool) -> list[str]:
    """The table's cells of one variant; its share of the roofline where ``shown``."""
    counts = report.clusters, report.registers, report.spills, report.shared, report.blocks
    found = [case.name, arch, *(str(n) for n in counts), str(report.width)]
    found += [f"{report.sass:.1f}" if report.sass else "-", f"{report.mufu:.2f}"]
    return [*found, f"{report.bytes:g}", f"{case.least_bytes / cost(report):.0%}" if shown else ""]


def write_budgets(path: pathlib.Path, found: dict[str, Report]) -> None:
    """One line a variant, so that a change of budget reads as a change of one line."""
    kept = {n: {k: round(getattr(r, k), 2) for k in ("registers", "sass", "mufu")}
            for n, r in found.items()}  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    path.write_text(f'{{"triton": "{triton.__version__}", "variants": {{\n{lines}\n}}}}\n')


def write_table(path: pathlib.Path, title: str, rows: list[list[str]], notes: str) -> None:
    """``path``.csv with every row, ``path``.md with the same as a table under its notes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".csv").write_text(tables.comma_separated(COLUMNS, rows))
    table = tables.markdown(COLUMNS, rows, text=["arch"])
    title = f"# {title}, compiled by Triton {triton.__version__}"
    path.with_suffix(".md").write_text("\n\n".join(filter(None, (title, KEY, notes, table))) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="the variants the tests check")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--check", type=pathlib.Path, help="fail where a budget is exceeded")
    parser.add_argument("--record", type=pathlib.Path, help="write budgets")
    parser.add_argument("--peers", type=pathlib.Path, help="folder of peers' wheels: compare")
    parser.add_argument("--write", type=pathlib.Path, help="write FILE.csv and FILE.md")
    default = ROOT / "runs" / "aot.json"
    parser.add_argument("--cache", type=pathlib.Path, default=default, help="where results lie")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.peers is not None:
        import aot_peers

        chosen = aot_peers.peer_cases(options.peers)
    else:
        chosen = cases(options.subset)
    chosen = [case for case in chosen if options.only in case.name]
    wanted = [(case, arch) for case in chosen for arch in ARCHES if case.runs_on(arch)]
    found = reports(wanted, options.cache, lenient=options.peers is not None)
    budgets = json.loads(options.check.read_text())["variants"] if options.check else {}
    line = "{:58s} {:7s}" + " {:>9s}" * (len(COLUMNS) - 2)
    print(f"triton {triton.__version__}", line.format(*COLUMNS), sep="\n")
    bad, rows = 0, []
    for case, arch in wanted:
        report = found.get(f"{case.name} {arch}")
        if report is None:
            print(f"{case.name:58s} {arch:7s} does not compile")
            continue
        shown = arch == "sm_90" and case.bounded and options.peers is None
        rows.append(cells(case, arch, report, shown))
        print(line.format(*rows[-1]))
        if options.peers is None:
            wrong = faults(case, arch, report, budgets.get(f"{case.name} {arch}"))
            bad += len(wrong)
            print(*(f"  FAULT {fault}\n" for fault in wrong), sep="", end="")
    if options.record:
        write_budgets(options.record, found)
    if options.write and options.peers is None:
        write_table(options.write, "Every kernel variant", rows, "")
    elif options.write:
        title = f"Beside {aot_peers.versions(options.peers)}"
        write_table(options.write, title, rows, aot_peers.summary(found, "sm_90", 128_256))
    print(f"{len(rows)} variants, {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
