"""Measure this machine, make the report, compare two reports."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """\
examples:
  python benchmarks/run.py                     everything; a rerun continues where it stopped
  ... --only linear --dtype bfloat16           one suite, one dtype
  ... --against pytorch --against liger        kd beside these alone
  ... --compare OLD NEW                        what became slower; exit status 1 when ours did
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, or compare."""
    from kd_bench.shapes import ALL_SUITES

    parser = argparse.ArgumentParser(
        description="Times every loss beside PyTorch and whatever peers are installed, checks "
        "each answer against the float64 oracle first, and writes tables, plots and a page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = ", ".join(ALL_SUITES)
    parser.add_argument("--only", action="append", metavar="SUITE", help=f"one of {suites}")
    parser.add_argument("--shape", action="append", help="name of a shape, or its beginning")
    parser.add_argument("--tokens", type=int, help="of every shape (CPU: 64; GPU: the shape's own)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--divergence", action="append", help="forward_kl, reverse_kl, jsd(0.5)")
    parser.add_argument("--against", action="append", metavar="NAME", help="part of a name")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (RESULTS/DEVICE)")
    parser.add_argument("--results", type=Path, default=Path("bench-results"), help="its parent")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds at least (5)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time for a group's rounds (10)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--add", action="store_true", help="add rows and rounds to what is there")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs")
    parser.add_argument("--list", action="store_true", help="show the groups and stop")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--threshold", type=float, default=0.15, help="change that counts (0.15)")
    args = parser.parse_args(argv)
    if args.compare:
        from kd_bench.compare import run as compare

        return compare(args.compare[0], args.compare[1], args.threshold)
    import torch

    from kd_bench import machine
    from kd_bench.plan import plan
    from kd_bench.report import write_report
    from kd_bench.runner import run_groups

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    groups = plan(
        device,
        smoke=args.smoke,
        tokens=args.tokens,
        suites=args.only,
        shapes=args.shape,
        dtypes=args.dtype,
        divergences=args.divergence,
    )
    if args.list:
        print("\n".join(group.name for group in groups))
        return 0
    print(machine.line_of(machine.machine_info(device)))
    folder = args.out or args.results / machine.folder_name(device)
    run_groups(
        groups,
        folder / "groups",
        fresh=args.fresh,
        add=args.add,
        device=device,
        against=None if args.against is None else tuple(args.against),
        rounds=args.rounds,
        seconds=args.seconds,
    )
    for path in write_report(folder, plots=not args.no_plots):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
