"""One row: an implementation's answer against the truth, its peak memory, its timed rounds."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import time
from pathlib import Path
from typing import Any

import torch

from kd_bench import machine
from kd_bench.suite import Implementation, Inputs, Problem, Step, Truth

MEMORY_SHARE = 0.7  # of what is free: what needs more is not tried
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
VALUE_LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}  # relative; gradients four times


class NotMeasured(Exception):
    """Why a row has no time."""


class WrongAnswer(NotMeasured):
    """The answer is too far from the oracle's to be timed."""


ceilings = functools.cache(machine.ceilings)  # measured once in a run for each dtype
HELD: dict[tuple[Problem, str], tuple[Inputs, Truth]] = {}


def prepared(problem: Problem, device: str) -> tuple[Inputs, Truth]:
    """Inputs on the device, and the truth, of the problem in hand; the one before is let go."""
    if (problem, device) not in HELD:
        HELD.clear()
        inputs = problem.suite.inputs(problem)
        truth = problem.suite.truth(problem, problem.suite.few(inputs))
        HELD[problem, device] = {name: t.to(device) for name, t in inputs.items()}, truth
    return HELD[problem, device]


def guard(problem: Problem, implementation: Implementation, device: str) -> None:
    """Raise ``NotMeasured`` for what is not installed, cannot run here or would not fit."""
    if machine.version_of(implementation.package) is None:
        raise NotMeasured(f"{implementation.package} is not installed")
    if implementation.needs_gpu and device == "cpu":
        raise NotMeasured("needs a GPU: on a CPU its Triton kernels would run in an interpreter")
    needed, free = problem.suite.memory(problem, implementation), machine.free_memory(device)
    if needed > MEMORY_SHARE * free:
        raise NotMeasured(f"needs about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free")


def checked(problem: Problem, implementation: Implementation, device: str) -> dict[str, Any]:
    """{value_error, grad_error, detail} of an implementation on the few tokens of the truth.

    Raises:
        WrongAnswer: it should be exact and is not.
    """
    inputs, truth = prepared(problem, device)
    step = implementation.build(problem, problem.suite.few(inputs))
    value, worst = problem.suite.errors(step.check(), truth)
    limit = VALUE_LIMITS[problem.dtype]
    if not implementation.approximate and not (value <= limit and worst <= 4 * limit):
        raise WrongAnswer(f"wrong answer: value error {value:.1e}, {problem.suite.error_name} "
                          f"{worst:.1e}")  # fmt: skip
    return {"value_error": value, "grad_error": worst, "detail": step.detail}


def reset_peak(device: str) -> int | None:
    """Start to watch for the highest use of memory; bytes in use now, None where that is unknown.

    On a GPU by the allocator. On Linux by the kernel's high-water mark of resident memory, after
    free memory that the allocator kept was handed back: what a library keeps for the life of the
    process, such as its packing buffers, is not counted again.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux with glibc
        return None
    return resident("VmRSS")


def peak(device: str) -> int:
    """Bytes at the highest use since ``reset_peak``."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def peak_of(step: Step, inputs: Inputs, device: str) -> dict[str, Any]:
    """Extra bytes at the peak of a step, above the inputs and the gradients it returns."""
    before = reset_peak(device)
    _, results = step()
    machine.synchronize(device)
    extra = None if before is None else peak(device) - before
    given = {tensor.data_ptr() for tensor in inputs.values()}
    returned = sum(t.nbytes for t in results.values() if t.data_ptr() not in given)
    extra = None if extra is None else max(0, extra - returned)
    return {"extra_memory": extra, "returned_memory": returned}


def measure(
    problem: Problem, implementation: Implementation, device: str, benchmark: Any, seconds: float
) -> None:
    """Check one implementation, then time it with pytest-benchmark; ``extra_info`` has the rest.

    Each round is device-synchronised and comes right after a round of the suite's bare work, if it
    has some, whose time is kept beside it: their ratio does not see a slow minute of the machine.
    Without bare work it comes after an untimed step, so that memory is warm either way.

    Args:
        seconds: rounds are cut to ``LEAST_ROUNDS`` where they would take longer.

    Raises:
        NotMeasured: and why.
    """
    benchmark.group = problem.name
    suite, shape, size = problem.suite, problem.shape, problem.itemsize
    machine.release(device)
    guard(problem, implementation, device)
    found = {} if implementation.bare else checked(problem, implementation, device)
    inputs, _ = prepared(problem, device)
    step = implementation.build(problem, inputs)
    step()  # compiles, and makes what is made once
    found |= peak_of(step, inputs, device)
    bare = step if problem.bare is None else problem.bare.build(problem, inputs)
    beside: list[float] = []

    def timed() -> None:
        step()
        machine.synchronize(device)

    def before() -> None:
        started = time.perf_counter()
        bare()
        machine.synchronize(device)
        beside.append(time.perf_counter() - started)

    with suite.surroundings():
        before(), timed()
        started = time.perf_counter()
        before(), timed()
        rounds = int(seconds / (time.perf_counter() - started))
        beside.clear()
        rounds = min(max(LEAST_ROUNDS, rounds), MOST_ROUNDS)
        benchmark.pedantic(timed, setup=before, rounds=rounds)
    benchmark.extra_info |= {
        "suite": suite.name,
        "shape": vars(shape),
        "dtype": problem.dtype,
        "divergence": problem.divergence,
        "implementation": implementation.name,
        "version": machine.version_of(implementation.package),
        "bare": implementation.bare,
        "bare_name": problem.bare.name if problem.bare else "",
        "error_name": suite.error_name,
        "note": "; ".join(filter(None, (implementation.note, found.pop("detail", "")))),
        "least_flops": suite.flops(shape),
        "least_bytes": suite.bytes(shape, size),
        "bare_seconds": [] if problem.bare is None else beside,
        "ceilings": ceilings(device, problem.dtype, min(1.0, seconds / 10)),
        **found,
    }
