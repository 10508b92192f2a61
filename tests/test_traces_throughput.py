"""The bulk pipeline of benchmarks/bench_traces.py: 1,000 records by default, 100,000 when slow."""

import resource
import time

import pytest

import bench_traces as bench
from kd_bench import tables

pytest.importorskip("rensa")


def test_a_thousand_records_run_through_every_stage(tmp_path, capsys):
    tables.show(bench.run(1_000, tmp_path))
    printed = capsys.readouterr().out
    for stage in ("load", "filter", "dedupe near", "decontaminate", "mix", "render"):
        row = next(line for line in printed.splitlines() if line.startswith(f"| {stage} "))
        seen, kept, rate = (int(cell.replace(",", "")) for cell in row.split("|")[2:5])
        assert 0 < kept <= seen and rate > 0, row
        assert kept < seen or stage not in ("filter", "dedupe exact", "dedupe near"), row
    full = float(printed.split("rows of 16,384 are ")[1].split(" %")[0])
    assert full >= 95.0  # the last row of so few is half empty


@pytest.mark.slow
def test_100_000_records_take_less_than_ten_minutes_and_4_gib(tmp_path, capsys):
    started = time.monotonic()
    tables.show(bench.run(100_000, tmp_path))
    assert time.monotonic() - started < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20
    printed = capsys.readouterr().out
    assert float(printed.split("rows of 16,384 are ")[1].split(" %")[0]) >= 97.0
