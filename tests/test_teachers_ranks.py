"""Any number of ranks stores what one does, and may continue what another number began."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import cache_cases as cases
import pytest

from kd.cache import TeacherCache
from kd.cache.verify import verify_cache
from kd.teachers import build_cache

TESTS = Path(__file__).parent


def launch(folder, world):
    """Run all ranks of a capture, as torchrun and accelerate launch would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    roots = [TESTS, TESTS.parent, TESTS.parent / "kernels", TESTS.parent / "recipes"]
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, TESTS / "cache_ranks.py", folder],
            env={**os.environ, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors


def alone(folder, **options):
    settings = {"top_k": 8, "batch_tokens": 60, "shard_tokens": 100, "progress": False}
    return build_cache(cases.teacher(), cases.texts(60, seed=3), folder, **{**settings, **options})


def check(folder, whole):
    cache = TeacherCache(folder)
    assert len(cache) == len(whole) == 60
    assert cache.content_digest() == whole.content_digest()
    assert verify_cache(folder).sound


def test_two_ranks_store_what_one_does(tmp_path):
    whole = alone(tmp_path / "whole")
    launch(tmp_path / "cache", 2)
    check(tmp_path / "cache", whole)
    names = {entry.name[:10] for entry in TeacherCache(tmp_path / "cache").manifest.shards}
    assert names == {"shard-0000", "shard-0001"}


@pytest.mark.slow
def test_four_ranks_store_what_one_does(tmp_path):
    launch(tmp_path / "cache", 4)
    check(tmp_path / "cache", alone(tmp_path / "whole"))
    alone(tmp_path / "cache")  # one rank goes on where four ended: nothing to do
    check(tmp_path / "cache", alone(tmp_path / "whole"))
