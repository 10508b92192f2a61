"""Verifies programs by running them on tests, in a sandbox that has to be asked for."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

from kd.traces.trace import Trace
from kd.traces.verifiers.code import packages
from kd.traces.verifiers.code.asserts import Asserts, Refused, Step
from kd.traces.verifiers.code.blocks import defined, parsed
from kd.traces.verifiers.code.programs import find_program
from kd.traces.verifiers.code.suites import Cases, Wrapped, read_tests
from kd.traces.verifiers.code.trials import Backend, Failed, Trials, failure, too_large, unanswered
from kd.traces.verifiers.code.values import RAISED, decode, same, same_output, shown
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, WRONG, Verdict

# what the sites that such functions come from import before they run them
_USUAL = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, floor, gcd, inf, isqrt, log, log2, sqrt
from typing import *
"""


class Code:
    """The program in the answer must pass every test of the record (suites.py lists the shapes).

    What a test wants never enters the sandbox, so a program cannot print its own verdict. Tests
    that can only be judged beside the program (loops, helpers that the test defines) are run; they
    may show that it is wrong, but when all hold the verdict is "unknown", unless they are trusted.

    "unknown" are also: no tests, tests without outputs or that cannot be read, a program in
    another language, and a program that needs a package which the sandbox lacks.

    Args:
        backend: runs (program, stdin) and returns a ``Run``: ``Bubblewrap()``, your own callable
            to another machine, or ``UnsafeSubprocess()``. None, the default: nothing is run, and
            every verdict is "unknown: code verification is off".
        most: tests run at most; None for all. The first that fails ends the check, and a verdict
            on fewer than all says "20 of 57 tests run".
        trust_inside_tests: let tests that run beside the program make it correct, though a
            program bent on it could make them hold.
        retries: of a run that the sandbox, not the program, failed.
    """

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        most: int | None = None,
        trust_inside_tests: bool = False,
        retries: int = 1,
    ) -> None:
        if most is not None and most < 1:
            raise ValueError(f"Code: most must be at least 1 or None, got {most}.")
        self.backend = backend
        self.most = most
        self.trust_inside_tests = trust_inside_tests
        self._trials = None if backend is None else Trials(backend, retries)

    def __repr__(self) -> str:
        trusting = ", trust_inside_tests=True" if self.trust_inside_tests else ""
        return f"Code({self.backend!r}, most={self.most}{trusting})"

    def __call__(self, trace: Trace) -> Verdict:
        if self._trials is None:
            return Verdict(UNKNOWN, "code verification is off")
        try:
            tests = read_tests(trace.metadata)
        except Refused as refused:
            return Verdict(UNKNOWN, refused.reason, detail=refused.detail)
        if tests is None or not len(tests):
            return Verdict(UNKNOWN, "no tests")
        found = find_program(trace.answer, tests.names, reads=tests.reads)
        if found.program is None:
            status = UNKNOWN if found.foreign else WRONG
            return Verdict(status, found.reason, detail=found.foreign)
        program = found.program
        if isinstance(tests, Asserts) and tests.name:
            tests, program = _continued(trace, tests, program)
        available = self._trials.available(program, tests.sources)
        needed = packages.lost(tests.sources, available, known=False)
        if needed:
            return Verdict(UNKNOWN, "tests need a package", detail=needed)
        needed = packages.lost(program, available)
        if needed:
            return Verdict(UNKNOWN, "package missing in the sandbox", detail=needed)
        return self._judged(self._trials, program, tests)

    def _judged(self, trials: Trials, program: str, tests: Cases | Asserts) -> Verdict:
        run = tests.first(self.most)
        if isinstance(run, Asserts):
            failed, seconds = _asserts(trials, program, run)
        elif run.name:
            failed, seconds = _calls(trials, program, run)
        else:
            failed, seconds = _texts(trials, program, run)
        if failed is not None:
            available = trials.available(program)
            needed = packages.lost_on_the_way(program, failed.error, failed.line, available)
            if needed:
                return Verdict(UNKNOWN, "package missing in the sandbox", seconds, needed)
            return Verdict(failed.status, failed.reason, seconds, failed.detail)
        extra: dict[str, Any] = {"tests": len(run)}
        told = []
        if len(run) < len(tests):
            extra["of"] = len(tests)
            told.append(f"{len(run)} of {len(tests)} tests run")
        inside = sum(step.inside for step in run.tests) if isinstance(run, Asserts) else 0
        if inside:
            extra["asserted_inside"] = inside
        reason = ""
        if inside and not self.trust_inside_tests:
            reason = "tests inside the sandbox"
            told.append(f"{inside} of {len(run)} tests hold, but run beside the program")
        elif isinstance(run, Cases) and run.unread:
            reason = "tests cannot be read"
            told.append(f"{len(run)} tests passed; {'; '.join(run.unread)}")
        return Verdict(UNKNOWN if reason else CORRECT, reason, seconds, "; ".join(told), extra)


def _texts(trials: Trials, program: str, tests: Cases) -> tuple[Failed | None, float]:
    """A run for every input."""
    seconds = 0.0
    for number, (given, wanted) in enumerate(tests.cases):
        run = trials.run(program, given)
        seconds += run.seconds
        failed = failure(run)
        if failed is None and not same_output(run.stdout, wanted):
            failed = Failed("wrong output", f"{shown(run.stdout)!r}, not {shown(wanted)!r}")
        if failed is not None:
            return _numbered(too_large(failed, wanted, trials.backend), number), seconds
    return None, seconds


def _calls(trials: Trials, program: str, tests: Cases) -> tuple[Failed | None, float]:
    """One run for all calls, as far as the time goes."""
    steps = [("call", given) for given, _ in tests.cases]
    asked = trials.ask(program, steps, setup=_USUAL, name=tests.name)
    wrapped = any(isinstance(wanted, Wrapped) for _, wanted in tests.cases)
    failed: Failed | None = None
    for unwrap in [True, False] if wrapped else [False]:  # one reading for all tests
        for number, (_, wanted) in enumerate(tests.cases):
            failed = unanswered(asked, number, "value")
            if failed is None:
                meant = wanted[0] if unwrap else wanted
                failed = _compared(asked.answers[number][1], meant)
            if failed is not None:
                failed = _numbered(too_large(failed, wanted, trials.backend), number)
                break
        if failed is None:
            break
    return failed, asked.run.seconds


def _asserts(trials: Trials, program: str, tests: Asserts) -> tuple[Failed | None, float]:
    """One run for all statements, as far as the time goes."""
    steps = [
        ("values", list(step.plan.holes)) if step.plan else ("run", step.source)
        for step in tests.steps
    ]
    asked = trials.ask(program, steps, setup=tests.setup, name=tests.name)
    for number, step in enumerate(tests.steps):
        failed = unanswered(asked, number, "values" if step.plan else "held")
        if failed is None and step.plan is not None:
            failed = _held(step, asked.answers[number][1])
        if failed is not None:
            if number == 0 and tests.setup and failed.reason == "program crashed":
                alone = trials.ask("", [("run", "")], setup=tests.setup, name="")
                if unanswered(alone, 0, "held"):
                    failed = replace(failed, status=UNKNOWN, reason="tests cannot be run")
            reason = "assertion failed" if failed.reason == "raised" else failed.reason
            detail = f"{shown(step.source, 120)}: {failed.detail or failed.reason}"
            return replace(failed, reason=reason, detail=detail), asked.run.seconds
    return None, asked.run.seconds


def _continued(trace: Trace, tests: Asserts, program: str) -> tuple[Asserts, str]:
    """HumanEval's prompt is code: what it imports and defines is there too, and an answer may be
    the body of its last function alone."""
    prompt = str(trace.metadata.get("prompt") or trace.prompt)
    stub = parsed(prompt)
    if stub is None or tests.name not in defined(stub):
        return tests, program
    tree = parsed(program)
    if tree is not None and tests.name in defined(tree):
        return replace(tests, setup=f"{prompt}\n{tests.setup}"), program
    whole = f"{prompt.rstrip()}\n{textwrap.indent(program, '    ')}"
    return tests, whole if parsed(whole) is not None else program


def _numbered(failed: Failed, number: int) -> Failed:
    return replace(failed, detail=f"test {number}: {failed.detail}")


def _compared(code: Any, wanted: Any) -> Failed | None:
    try:
        found = decode(code)
        if same(found, wanted, json_like=True):
            return None
    except RAISED as error:  # whatever it wrote that cannot be compared is not what is wanted
        return Failed("unreadable result", f"{type(error).__name__}: {error}"[:120])
    return Failed("wrong result", f"{shown(found)}, not {shown(wanted)}")


def _held(step: Step, codes: Any) -> Failed | None:
    assert step.plan is not None
    try:
        values = [decode(code) for code in codes]
        if len(values) == len(step.plan.holes) and step.plan.holds(values):
            return None
    except RAISED as error:  # whatever it wrote that cannot be compared is not what is wanted
        return Failed("assertion failed", f"{type(error).__name__}: {error}"[:120])
    return Failed("assertion failed", f"got {', '.join(map(shown, values))}")
