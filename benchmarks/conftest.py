"""``make bench`` and ``make bench-gpu``, or ``pytest benchmarks``: pytest-benchmark suites.

A suite is a file ``bench_*.py`` with ``problems(device, tokens, smoke)``; each problem is a group,
each implementation in it a row. Choose with ``-k "linear and bfloat16"``. With ``--results FOLDER``
rows are kept in FOLDER/DEVICE/results.json, a rerun continues, and tables and plots are made.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

sys.path.insert(0, str(Path(__file__).parent))

from kd_bench import machine, suite  # noqa: E402
from kd_bench.measure import HELD, NotMeasured, WrongAnswer, measure  # noqa: E402
from kd_bench.results import UNFINISHED, Results, measured_row, write_report  # noqa: E402

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser):
    group = parser.getgroup("kd benchmarks")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--smoke", action="store_true", help="every suite once at a tiny shape")
    group.addoption("--tokens", type=int, help="of every shape (CPU: 64; GPU: the shape's own)")
    group.addoption("--divergence", action="append", help="instead of the planned ones: jsd(0.5)")
    group.addoption("--seconds", type=float, default=10.0, help="for the rounds of a row (10)")
    group.addoption("--results", type=Path, help="keep rows and tables in RESULTS/DEVICE")
    group.addoption("--fresh", action="store_true", help="measure again what is there")


def pytest_configure(config):
    suite.add_peers_to_path()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped, and not a row's fault
    if config.getoption("--device") == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = machine.one_card()
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU here.")
    results, device = config.getoption("--results"), config.getoption("--device")
    if results is not None:
        folder = config.invocation_params.dir / results / machine.folder_name(device)
        config.stash[RESULTS] = Results(folder, config.getoption("--fresh"))


@functools.cache
def machine_info(device):
    commit = get_commit_info()
    known = commit["id"] not in ("unversioned", "unknown")
    return machine.machine_info(device, commit["id"][:7] + "+" * commit["dirty"] if known else "")


def pytest_benchmark_generate_machine_info(config):
    return machine_info(config.getoption("--device"))


def planned(module, config):
    """The problems of a file, with the divergences that were asked for."""
    options = (config.getoption(name) for name in ("--device", "--tokens", "--smoke"))
    found = module.problems(*options)
    asked = config.getoption("--divergence")
    for name in asked or ():
        suite.parse_divergence(name)
    if not asked:
        return found
    made = {}  # in order, each once
    for problem in found:
        names = asked if problem.suite.any_divergence else [problem.divergence]
        made |= {dataclasses.replace(problem, divergence=name): None for name in names}
    return list(made)


def pytest_generate_tests(metafunc):
    """One test for each problem of a file and each implementation that takes part in it."""
    if "row" in metafunc.fixturenames:
        rows = [(p, i) for p in planned(metafunc.module, metafunc.config) for i in p.entrants()]
        metafunc.parametrize("row", rows, ids=[f"{p.name}/{i.name}" for p, i in rows])


def pytest_collection_modifyitems(config, items):
    """Leave out the rows that an earlier run has measured."""
    kept = config.stash.get(RESULTS, None)
    if kept is None:
        return
    done = [i for i in items if hasattr(i, "callspec") and kept.has(i.callspec.id)]
    items[:] = [item for item in items if item not in done]
    config.hook.pytest_deselected(items=done)


@pytest.fixture
def row(request):
    return request.param


@pytest.fixture(name="measure")
def measure_fixture(request, benchmark):
    """``measure(row)``: check, time and keep one implementation; or keep why it has no time."""
    config = request.config
    results, device = config.stash.get(RESULTS, None), config.getoption("--device")

    def keep(problem, implementation, reason):
        if results is not None:
            head = {"group": problem.name, "name": f"{problem.name}/{implementation.name}"}
            version = machine.version_of(implementation.package)
            results.put({**head, "implementation": implementation.name, "version": version,
                         "reason": reason})  # fmt: skip

    def run(row):
        problem, implementation = row
        failed = None
        keep(problem, implementation, UNFINISHED)  # what ends the process is not tried again
        try:
            measure(problem, implementation, device, benchmark, config.getoption("--seconds"))
        except KeyboardInterrupt:
            keep(problem, implementation, "interrupted")
            raise
        except Exception as error:  # a row beside the others'; the run goes on
            known, failed = isinstance(error, NotMeasured), " ".join(str(error).split())[:300]
            failed = failed if known else f"{type(error).__name__}: {failed}"
            keep(problem, implementation, failed)
            if isinstance(error, WrongAnswer) or (implementation.name == "kd" and not known):
                raise
        if failed is not None:  # out here, where the error's frames hold no memory
            pytest.skip(failed)
        if results is not None:
            results.machine = info = machine_info(device)
            command = machine.command_line(config.invocation_params.args)
            results.put(measured_row(benchmark.stats.as_dict(), info, command))

    return run


def pytest_sessionfinish(session):
    HELD.clear()
    results = session.config.stash.get(RESULTS, None)
    if results is not None and results.new:
        for path in write_report(results.path.parent):
            print(path)
