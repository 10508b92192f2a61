"""Kill a capture again and again; run by test_cache_kill as a process of its own.

    python cache_kill.py FOLDER KILLS SEED

Every capture is a forked child, so that torch is imported once. Prints how many kills hit a running
capture, and whether the survivor equals an uninterrupted capture file by file.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import cache_cases as cases
import torch
from transformers import Qwen2ForCausalLM  # noqa: F401  (imported once, before the forks)

from kd.cache import TeacherCache
from kd.teachers import build_cache


def capture(folder):
    torch.set_num_threads(1)
    build_cache(
        cases.teacher(),
        cases.texts(150, seed=3),
        folder,
        top_k=8,
        batch_tokens=60,
        shard_tokens=100,
        progress=False,
    )


def forked(function, *args):
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def contents(folder):
    """Name and bytes of every file that belongs to the format."""
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name[0] != "."}


def main(folder, kills, seed):
    rng, folder = random.Random(seed), Path(folder)
    start = time.perf_counter()
    assert os.waitpid(forked(capture, folder / "whole"), 0)[1] == 0
    took = time.perf_counter() - start
    hit = resumed = tries = 0
    while hit < kills and tries < 4 * kills:
        tries += 1
        before = len(list((folder / "killed").glob("shard-*")))
        pid = forked(capture, folder / "killed")
        time.sleep(rng.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == 0:  # it had ended: start from an empty folder
            shutil.rmtree(folder / "killed")
        else:
            hit, resumed = hit + 1, resumed + (before > 0)
    status = os.waitpid(forked(capture, folder / "killed"), 0)[1]
    whole, survivor = contents(folder / "whole"), contents(folder / "killed")
    leftovers = [item.name for item in (folder / "killed").glob(".tmp*")]
    same = TeacherCache(folder / "whole").content_digest()
    same = same == TeacherCache(folder / "killed").content_digest()
    for name in sorted(whole.keys() | survivor.keys()):
        if whole.get(name) != survivor.get(name):
            print("differs:", name, len(whole.get(name, b"")), len(survivor.get(name, b"")))
    print(
        f"status={status} hit={hit} resumed={resumed} shards={len(whole) - 1} "
        f"files_equal={whole == survivor} content_equal={same} leftovers={leftovers}"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
