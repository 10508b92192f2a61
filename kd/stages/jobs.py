"""Independent small jobs on the cores of one machine: a process each, few threads each.

Training a model of a few hundred thousand parameters gains little from a second thread; two
trainings side by side gain nearly twice.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from kd.progress import Progress

Report = Callable[[float], None]
_reports: Any = None


def default_workers(limit: int = 8) -> int:
    """The cores this process may use, at most ``limit``; 1 inside a distributed launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(limit, cores or 1))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread inside: for models so small that a second one only waits.

    With two threads on cores that something else uses too, small operations take many times
    longer, since each waits for the slower thread.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start_worker(reports: Any, parent: int, threads: int) -> None:
    global _reports
    _reports = reports
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """A worker must not outlive a killed parent: a rerun would find it writing in its folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(function: Callable[..., Any], index: int, job: Any) -> Any:
    return function(job, lambda share: _reports.put((index, share)))


def run_jobs(
    function: Callable[[Any, Report], Any],
    jobs: Sequence[Any],
    description: str,
    workers: int = 1,
    threads: int = 1,
) -> list[Any]:
    """``[function(job, report) for job in jobs]``, several at a time, under one progress bar.

    Args:
        function: a module-level function; it may call ``report(share)`` with its share done.
        jobs: picklable arguments.
        description: shown at the bar.
        workers: processes; 1 runs everything in this one.
        threads: of each process, when there are several.

    Returns:
        The results in the order of the jobs. The first failure stops the rest and is raised.

    Raises:
        Checked: trainings were to be checked, not started; every job's check is in it.
    """
    from kd.training import preflight

    if preflight.asked():
        return _checked(function, jobs)
    shares = [0.0] * len(jobs)
    with Progress(description, len(jobs)) as bar:

        def note(index: int, share: float) -> None:
            shares[index] = share
            bar.to(sum(shares), f"({sum(s >= 1 for s in shares)} of {len(jobs)} done)")

        if workers <= 1 or len(jobs) <= 1:
            results = []
            for index, job in enumerate(jobs):
                results.append(function(job, lambda share, i=index: note(i, share)))  # type: ignore[misc]
                note(index, 1.0)
            return results
        return _in_processes(function, jobs, min(workers, len(jobs)), threads, note)


def _checked(function: Callable[[Any, Report], Any], jobs: Sequence[Any]) -> list[Any]:
    from kd.training.preflight import Checked

    results, checks = [], []
    for job in jobs:
        try:
            results.append(function(job, lambda share: None))
        except Checked as found:
            checks += found.checks
    if checks:
        raise Checked(checks)
    return results


def _in_processes(
    function: Callable[[Any, Report], Any],
    jobs: Sequence[Any],
    workers: int,
    threads: int,
    note: Callable[[int, float], None],
) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    reports = context.Manager().Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (reports, os.getpid(), threads))
    try:
        waiting: dict[Future[Any], int] = {
            pool.submit(_call, function, index, job): index for index, job in enumerate(jobs)
        }
        results: list[Any] = [None] * len(jobs)
        while waiting:
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            try:
                while True:
                    note(*reports.get_nowait())
            except queue.Empty:
                pass
            for future in done:
                index = waiting.pop(future)
                results[index] = future.result()
                note(index, 1.0)
        return results
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
