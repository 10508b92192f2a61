"""The ranks of the tensor-parallel tests: shard_ranks.py FOLDER.

Each runs every case on its shard, counts the collectives, and writes what it found.
"""

import os
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
    torch.set_num_threads(1)
    store = f"file://{folder}/store.{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    counts, found = counted(), {}
    for name, case in shard_cases.cases(ranks).items():
        for backend in case.backends:
            found[name, backend] = run(case, rank, ranks, backend, counts)
    torch.save(found, f"{folder}/{ranks}.{rank}")
    dist.destroy_process_group()


def main():
    """Every world, one after the other; ranks are forked, so that libraries load once."""
    folder = sys.argv[1]
    for ranks in shard_cases.RANKS:
        started = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                work(rank, ranks, folder)
                os._exit(0)
            started.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
        if any(codes):
            sys.exit(f"{ranks} ranks exited with {codes}")


if __name__ == "__main__":
    main()
