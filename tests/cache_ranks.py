"""One rank of a distributed capture; run by test_teachers_ranks with RANK and WORLD_SIZE set."""

import sys

import cache_cases as cases
import torch

from kd.teachers import build_cache

if __name__ == "__main__":
    torch.set_num_threads(1)
    build_cache(
        cases.teacher(),
        cases.texts(60, seed=3),
        sys.argv[1],
        top_k=8,
        batch_tokens=60,
        shard_tokens=100,
        progress=False,
    )
