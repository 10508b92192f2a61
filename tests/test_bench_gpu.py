"""``make bench-gpu`` without a GPU: no card is overfilled, nothing is half-written.

Workers are replaced by ones that only account for what they would hold; groups, guards, order and
files are the real ones.
"""

import contextlib
import json
import sys

import pytest

from kd_bench import machine, plan, process, report, runner
from kd_bench.implementations import IMPLEMENTATIONS
from kd_bench.steps import Implementation, is_floor

GIB = 1 << 30
RATES = {"copy_bytes_per_second": 1e12}
RATES |= {f"matmul_{name}_flops_per_second": 1e14 for name in ("bfloat16", "float32")}


class Card:
    """The memory of a pretended card, and who holds some of it."""

    def __init__(self, size):
        self.size, self.used, self.most, self.failing = size, 0, 0, ()


class Worker:
    """Holds what the guard thinks an implementation needs, from its first answer until closed."""

    card = Card(0)

    def __init__(self, folder, group, device, implementation):
        assert device == "cuda"
        self.name, self.held = implementation.name, 0
        self.needs = group.needs(implementation)

    def ask(self, command):
        if self.name in self.card.failing:
            return {"error": "OutOfMemoryError: CUDA out of memory"}
        if not self.held:
            self.held = self.needs
            self.card.used += self.held
            self.card.most = max(self.card.most, self.card.used)
        if command == "check":
            return {"value": 1.0, "value_error": 1e-7, "grad_error": 1e-6}
        if command == "memory":
            return {"extra_memory": 1 << 20, "returned_memory": 0, "whole_value": 1.0}
        return {"seconds": 0.5}

    def close(self):
        self.card.used, self.held = self.card.used - self.held, 0


@pytest.fixture
def card(monkeypatch):
    made = Card(0)
    monkeypatch.setattr(Worker, "card", made)
    monkeypatch.setattr(runner, "Process", Worker)
    monkeypatch.setattr(runner, "prepared_inputs", lambda *_: contextlib.nullcontext("nowhere"))
    monkeypatch.setattr(runner, "_ceilings", lambda *_: RATES)
    monkeypatch.setattr(runner, "version_of", lambda package: "1.0")
    free = {"cuda": lambda: made.size - made.used, "cpu": lambda: 512 * GIB}
    monkeypatch.setattr(machine, "free_memory", lambda device: free[device]())
    monkeypatch.setattr(machine, "device_name", lambda device: "a pretended card")
    monkeypatch.setattr(machine, "total_memory", lambda device: made.size)
    return made


@pytest.mark.parametrize("size", [8 * GIB, 24 * GIB, 80 * GIB, 192 * GIB])
def test_no_card_is_overfilled_and_what_does_not_fit_says_so(card, size, tmp_path):
    card.size = size
    groups = plan.plan("cuda")
    runner.run_groups(groups, tmp_path / "groups", device="cuda", say=lambda line: None)
    assert card.used == 0 and 0 < card.most <= runner.MEMORY_SHARE * size
    found = report.load_groups(tmp_path)
    assert {group["group"] for group in found} == {group.name for group in groups}
    for group in found:
        for row in group["rows"]:
            assert row["seconds"] or "GiB free" in row["skipped"]
            if row["implementation"] == "kd" and size >= 24 * GIB:
                assert row["seconds"]
    written = report.write_report(tmp_path, plots=False)
    assert all(path.exists() for path in written)
    assert "a pretended card" in (tmp_path / "README.md").read_text()


def test_out_of_memory_all_the_same_is_a_row(card, tmp_path):
    card.size, card.failing = 80 * GIB, ("pytorch", "kd")
    groups = plan.plan("cuda", suites=["dense"])[:1]
    runner.run_groups(groups, tmp_path / "groups", device="cuda", say=lambda line: None)
    ((group),) = report.load_groups(tmp_path)
    rows = {row["implementation"]: row for row in group["rows"]}
    assert "out of memory" in rows["kd"]["skipped"] and rows["kd in place"]["seconds"]
    assert "not measured: OutOfMemoryError" in report.as_markdown([group])


def test_an_interrupted_run_leaves_whole_files_and_continues(card, tmp_path, monkeypatch):
    card.size = 80 * GIB
    groups = plan.plan("cuda", suites=["dense", "selection"])
    asked = []

    def ask(self, command, ask=Worker.ask):
        asked.append(command)
        if len(asked) == 100:
            raise KeyboardInterrupt
        return ask(self, command)

    monkeypatch.setattr(Worker, "ask", ask)
    options = dict(device="cuda", say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        runner.run_groups(groups, tmp_path, **options)
    assert card.used == 0  # the workers were closed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert 0 < len(before) < len(groups)
    assert all(json.loads(path.read_text())["rows"] for path in before)
    runner.run_groups(groups, tmp_path, **options)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(after) == len(groups) and before.items() <= after.items()


def test_a_host_too_small_for_the_inputs_skips_the_group(card, monkeypatch, tmp_path):
    card.size = 80 * GIB
    monkeypatch.setattr(machine, "free_memory", lambda device: GIB)
    groups = plan.plan("cuda", suites=["linear"])[:1]
    runner.run_groups(groups, tmp_path / "groups", device="cuda", say=lambda line: None)
    (group,) = report.load_groups(tmp_path)
    assert all("host's memory" in row["skipped"] for row in group["rows"])


def test_guard_counts_every_implementation_of_every_group():
    """Nothing is planned whose guard is smaller than its own inputs."""
    for group in plan.plan("cuda"):
        for implementation in group.entrants():
            assert group.needs(implementation) >= group.input_bytes() > -1
            assert is_floor(implementation.name) or implementation.copies > 0
    assert {made.name for made in IMPLEMENTATIONS.values() if made.needs_gpu}


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(sys, "executable", "sleep")  # `sleep -m ...` ends at once
    group = plan.plan("cpu", smoke=True)[0]
    broken = Implementation("none", (group.suite,), lambda *a: None)
    ended = process.Process(tmp_path, group, "cpu", broken)
    assert "its process ended" in ended.ask("check")["error"]
    (tmp_path / "hang").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "hang").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hang"))
    hanging = process.Process(tmp_path, group, "cpu", broken)
    assert "took longer than" in hanging.ask("check")["error"]
    assert hanging.process.poll() is not None
    hanging.close()


def test_workers_see_one_card(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert process._one_card("cuda") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert process._one_card("cpu") == {}
