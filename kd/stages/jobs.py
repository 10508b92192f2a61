"""Independent jobs of a stage, done once each: on the cores of one machine, a process each.

Training a model of a few hundred thousand parameters gains little from a second thread; two
trainings side by side gain nearly twice.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kd.files import read_json, write_json
from kd.progress import Progress

RESULT_FILE = "result.json"
Report = Callable[[float], None]
Job = tuple[Path, Mapping[str, Any]]
Result = dict[str, Any]
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


def _do(function: Callable[..., Result], job: Job, report: Report) -> Result:
    folder, arguments = job
    done = read_json(folder / RESULT_FILE)
    if not done:
        folder.mkdir(parents=True, exist_ok=True)
        done = function(folder, report, **arguments)
        write_json(folder / RESULT_FILE, done)
    return done


def _do_in_worker(function: Callable[..., Result], index: int, job: Job) -> Result:
    return _do(function, job, lambda share: _reports.put((index, share)))


def run_jobs(
    function: Callable[..., Result],
    jobs: Mapping[Path, Mapping[str, Any]],
    description: str,
    workers: int = 1,
    threads: int = 1,
) -> list[Result]:
    """``function(folder, report, **arguments)`` of every job, several at a time, one progress bar.

    A result is kept in its folder as ``result.json``: a job that has one is not done again.

    Args:
        function: a module-level function that returns a JSON-able dict; it may call
            ``report(share)`` with its share done. It finds its own earlier files in the folder if
            it was interrupted, and may continue.
        jobs: folder to picklable arguments.
        description: shown at the bar.
        workers: processes; 1 runs everything in this one.
        threads: of each process, when there are several.

    Returns:
        The results in the order of the jobs. The first failure stops the rest and is raised.

    Raises:
        Checked: trainings were to be checked, not started; every job's check is in it.
    """
    from kd.training import preflight

    listed = list(jobs.items())
    if preflight.asked():
        return _checked(function, listed)
    shares = [0.0] * len(jobs)
    with Progress(description, len(jobs)) as bar:

        def note(index: int, share: float) -> None:
            shares[index] = share
            bar.to(sum(shares), f"({sum(s >= 1 for s in shares)} of {len(jobs)} done)")

        if workers > 1 and len(jobs) > 1:
            return _in_processes(function, listed, min(workers, len(jobs)), threads, note)
        results = []
        for index, job in enumerate(listed):
            results.append(_do(function, job, partial(note, index)))
            note(index, 1.0)
        return results


def _checked(function: Callable[..., Result], jobs: list[Job]) -> list[Result]:
    from kd.training.preflight import Checked

    results, checks = [], []
    for job in jobs:
        try:
            results.append(_do(function, job, lambda share: None))
        except Checked as found:
            checks += found.checks
    if checks:
        raise Checked(checks)
    return results


def _in_processes(
    function: Callable[..., Result],
    jobs: list[Job],
    workers: int,
    threads: int,
    note: Callable[[int, float], None],
) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    reports = context.Manager().Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (reports, os.getpid(), threads))
    try:
        waiting: dict[Future[Result], int] = {
            pool.submit(_do_in_worker, function, index, job): index
            for index, job in enumerate(jobs)
        }
        results: list[Result] = [{}] * len(jobs)
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
