"""The ranks of the tensor-parallel tests: shard_ranks.py FOLDER.

Each runs every case on its shard, counts the collectives, and writes what it found. Ranks come
from a fork server that has imported their libraries once and has run nothing.
"""

import multiprocessing
import sys

import kernel_cases  # noqa: F401  Triton's interpreter, before any kernel
import shard_cases
import torch
import torch.distributed as dist

import kd


def counted():
    """All-reduces by kind, as the loss asks for them."""
    counts = []
    original = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, **more):
        counts.append(str(op).split(".")[-1])
        return original(tensor, op=op, group=group, **more)

    dist.all_reduce = all_reduce
    return counts


def run(case, rank, ranks, backend, counts):
    """(losses, gradients of this rank's leaves, collectives in forward, and in backward)."""
    student, teacher, leaves, options = shard_cases.shard(case, rank, ranks)
    for leaf in leaves:
        leaf.requires_grad_(True)
    counts.clear()
    loss = kd.vocab_parallel_loss(student, teacher, backend=backend, **options)
    forward = list(counts)
    counts.clear()
    upstream = shard_cases.upstream(loss)
    (loss.double() * upstream).sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves], forward, list(counts)


def work(rank, ranks, folder):
    store = f"file://{folder}/store.{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    counts, found = counted(), {}
    for name, case in shard_cases.cases(ranks).items():
        for backend in case.backends:
            found[name, backend] = run(case, rank, ranks, backend, counts)
    torch.save(found, f"{folder}/{ranks}.{rank}")
    dist.destroy_process_group()


def main():
    """Every world, one after the other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shard_cases"])
    for ranks in shard_cases.RANKS:
        started = [
            context.Process(target=work, args=(rank, ranks, sys.argv[1])) for rank in range(ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        codes = [process.exitcode for process in started]
        if any(codes):
            sys.exit(f"{ranks} ranks exited with {codes}")


if __name__ == "__main__":
    main()
