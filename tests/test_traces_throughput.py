"""The bulk pipeline of benchmarks/bench_traces.py: 1,000 records by default, 100,000 when slow."""

import importlib.util
import resource
import time
from pathlib import Path

import pytest

pytest.importorskip("rensa")
_PATH = Path(__file__).parents[1] / "benchmarks" / "bench_traces.py"
_SPEC = importlib.util.spec_from_file_location("kd_bench_traces", _PATH)
bench = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)


def test_a_thousand_records_run_through_every_stage(tmp_path, capsys):
    bench.run(1_000, tmp_path)
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
    bench.run(100_000, tmp_path)
    assert time.monotonic() - started < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20
    printed = capsys.readouterr().out
    assert float(printed.split("rows of 16,384 are ")[1].split(" %")[0]) >= 97.0
