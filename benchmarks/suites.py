"""What the pytest-benchmark suites share: the groups and steps of ``make bench``, in process."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from kd_bench import machine
from kd_bench.inputs import DTYPES, errors, exact_answer, first_rows, make_inputs
from kd_bench.peers import add_peers_to_path, version_of
from kd_bench.plan import plan
from kd_bench.runner import MEMORY_SHARE, Group
from kd_bench.steps import Implementation, answer_of, is_floor


@dataclasses.dataclass(frozen=True)
class Entry:
    """One implementation in one group."""

    group: Group
    implementation: Implementation
    device: str

    @property
    def name(self) -> str:
        return f"{self.group.name}/{self.implementation.name}"


def entries(suites, device, smoke):
    add_peers_to_path()
    return [
        Entry(group, implementation, device)
        for group in plan(device, smoke=smoke, suites=suites)
        for implementation in group.entrants()
    ]


@functools.lru_cache(maxsize=1)
def prepared(group: Group, device: str):
    """Inputs and truth of the group in hand; the one before is let go."""
    inputs = make_inputs(group.suite, group.shape, DTYPES[group.dtype])
    truth = exact_answer(group.suite, group.divergence, first_rows(inputs))
    return {name: tensor.to(device) for name, tensor in inputs.items()}, truth


@functools.lru_cache(maxsize=4)
def ceilings(device: str, dtype: str):
    return machine.ceilings(device, (dtype,))


def run(entry: Entry, benchmark, rounds: int = 3) -> None:
    """Check an implementation's answer, then time it; the findings go into ``extra_info``."""
    group, implementation, device = entry.group, entry.implementation, entry.device
    if version_of(implementation.package) is None:
        pytest.skip(implementation.missing or f"{implementation.package} is not installed")
    if implementation.needs_gpu and device == "cpu":
        pytest.skip("needs a GPU")
    needed, free = group.needs(implementation), machine.free_memory(device)
    if needed > MEMORY_SHARE * free:
        pytest.skip(f"needs about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free")
    inputs, truth = prepared(group, device)
    inputs = {name: t.clone() if name == "logits" else t for name, t in inputs.items()}

    def build(taken):
        return implementation.build(group.suite, group.divergence, taken)

    found = {}
    if not is_floor(implementation.name):
        few = {name: t.clone() if name == "logits" else t for name, t in first_rows(inputs).items()}
        step = build(few)
        own = getattr(step, "errors", None)
        found = own() if own is not None else errors(group.suite, answer_of(step), truth)
    step = build(inputs)

    def timed():
        step()
        machine.synchronize(device)

    benchmark.group = group.name
    benchmark.extra_info |= {**found, "ceilings": ceilings(device, group.dtype)}
    benchmark.extra_info |= {"implementation": implementation.name, "dtype": group.dtype}
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
    # Others by definition: torchtune's value, what a codec keeps, a top-32's loss.
    lossy = group.suite.startswith(("cache", "capture", "recipe"))
    exact = implementation.name not in ("torchtune chunked", "kd cached") and not lossy
    if found and exact:
        limit = 1e-4 if group.dtype == "float32" else 0.1
        assert found["value_error"] <= limit and found["grad_error"] <= 4 * limit
