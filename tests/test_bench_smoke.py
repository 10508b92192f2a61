"""The pytest-benchmark suites run at tiny shapes, and write pytest-benchmark's JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PIPELINES = ("cache-write", "cache-read", "capture", "training")  # a recipe takes longer
ROOT = Path(__file__).parents[1]
pytest.importorskip("pytest_benchmark")


def test_every_suite_runs(tmp_path):
    output = tmp_path / "results.json"
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "recipes"))
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-enable", "--smoke"]
    command += [
        "-o",
        "python_files=bench_linear.py bench_dense.py bench_sparse.py bench_pipelines.py",
    ]
    command += [
        f"--benchmark-json={output}",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "(kd or (pytorch and not compiled) or 128) and not recipe",
    ]
    # A worker of pytest-xdist, as this process may be, writes no benchmarks.
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=ROOT, env={**mine, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(output.read_text())["benchmarks"]
    suites = {entry["group"].partition("/")[0] for entry in found}
    assert suites == {"linear", "linear-sparse", "dense", "sparse", *PIPELINES}
    for entry in found:
        lossy = entry["group"].startswith(("cache", "capture"))  # a codec's error, not a loss's
        if entry["extra_info"]["implementation"] == "kd" and not lossy:
            assert entry["extra_info"]["grad_error"] < 1e-5
