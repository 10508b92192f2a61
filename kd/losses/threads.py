"""Row blocks of a CPU loss on threads of their own, each of which computes alone.

PyTorch splits every operation over OpenMP's threads and waits for the last of them: a loss is
hundreds of such waits, each a time slice of the scheduler's where another process holds a core.
Here a thread takes whole blocks of rows until none is left, with OpenMP off inside it: one wait.

OpenMP's number of threads belongs to the thread that sets it. It is set through OpenMP itself:
``torch.set_num_threads`` also changes what threads started later, anyone's, begin with.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Work = Callable[[int, int], None]
"""Computes rows first..last."""


@functools.cache
def _openmp() -> Any:
    """The process's OpenMP library, or None where it is not to be found."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads.restype = None
    except (AttributeError, OSError, TypeError):
        return None
    return library


def _alone() -> bool:
    """Switch OpenMP off in this thread; whether PyTorch takes it for switched off."""
    torch.get_num_threads()  # PyTorch's own first look, which would set it again
    _openmp().omp_set_num_threads(1)
    return torch.get_num_threads() == 1


def count(device: torch.device) -> int:
    """Threads that blocks of rows may be spread over; 1 where PyTorch's own are to be used."""
    if device.type != "cpu" or torch.compiler.is_compiling() or _get_current_dispatch_mode_stack():
        return 1
    return torch.get_num_threads() if _openmp() is not None else 1


def spread(
    start: int, stop: int, step: int, begin: Callable[[], Work], device: torch.device
) -> None:
    """Rows start..stop in blocks of ``step`` rows, each given to one of the threads.

    begin: called once in every thread; what it returns computes blocks and may keep memory that
    is the thread's own. This thread works too and is left as it was. The first error is raised.
    """
    threads = min(count(device), len(range(start, stop, step)))
    if threads < 2:
        work = begin()
        for first in range(start, stop, step):
            work(first, min(first + step, stop))
        return
    starts = iter(range(start, stop, step))
    lock, errors = threading.Lock(), []  # type: ignore[var-annotated]
    inference = torch.is_inference_mode_enabled()

    def blocks() -> None:
        work = begin()
        while not errors:
            with lock:
                first = next(starts, None)
            if first is None:
                return
            work(first, min(first + step, stop))

    def helper() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                if _alone():
                    blocks()
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=helper, daemon=True) for _ in range(threads - 1)]
    before, started = torch.get_num_threads(), []
    try:
        for thread in helpers if _alone() else ():
            try:
                thread.start()
            except RuntimeError:  # no more threads: those that there are do the work
                break
            started.append(thread)
        blocks()
    except BaseException as error:
        errors.insert(0, error)
    finally:
        _openmp().omp_set_num_threads(before)
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]
