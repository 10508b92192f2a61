"""The step-time benchmark runs, checks what it times, and writes its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_smoke(tmp_path):
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "recipes"))
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_training.py", "--smoke", "--results", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tmp_path.glob("*/training.json")
    rows = {row["implementation"]: row for row in json.loads(found.read_text())["rows"]}
    for ours, plain in (("kd SFT", "plain logits SFT"), ("kd online", "plain logits KD")):
        assert rows[ours]["loss"] == pytest.approx(rows[plain]["loss"], rel=1e-3)
        assert rows[ours]["norm"] == pytest.approx(rows[plain]["norm"], rel=1e-3)
        assert len(rows[ours]["seconds"]) == 2
