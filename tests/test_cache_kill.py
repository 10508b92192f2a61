"""A capture killed at random moments and run again stores what an uninterrupted one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(folder, kills, seed):
    roots = [TESTS, TESTS.parent, TESTS.parent / "kernels", TESTS.parent / "recipes"]
    done = subprocess.run(
        [sys.executable, TESTS / "cache_kill.py", folder, str(kills), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return dict(item.split("=", 1) for item in done.stdout.strip().splitlines()[-1].split(" ", 6))


def check(found, least):
    assert found["status"] == "0"
    assert int(found["shards"]) > 10
    assert int(found["hit"]) >= least, "the kills came after the end: nothing was tested"
    assert found["files_equal"] == "True" and found["content_equal"] == "True"
    assert found["leftovers"] == "[]"


def test_three_kills(tmp_path):
    check(run(tmp_path, 3, seed=1), least=3)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    check(run(tmp_path, 50, seed=0), least=50)
