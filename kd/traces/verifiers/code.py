"""Verifies programs by running them on tests, in a sandbox that has to be asked for."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from kd.sandbox import Run
from kd.traces.trace import Trace
from kd.traces.verifiers.asserts import RUNNER, Asserts, read_asserts, same
from kd.traces.verifiers.verdict import CORRECT, ERROR, UNKNOWN, WRONG, Verdict

Backend = Callable[[str, str], Run]
_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
_CALL = """
import io, json, sys
_request = json.loads(sys.stdin.readline())
sys.stdin = io.StringIO("")
_answers = sys.stdout
sys.stdout = sys.stderr
_space = {"__name__": "candidate"}
exec(compile(_request["program"], "candidate.py", "exec"), _space)
_function = _space.get(_request["name"])
if _function is None and "Solution" in _space:
    _function = getattr(_space["Solution"](), _request["name"])
for _arguments in _request["calls"]:
    _answers.write(_request["nonce"] + json.dumps(_function(*_arguments)) + "\\n")
    _answers.flush()
"""


def extract_program(answer: str) -> str | None:
    """The last Python code block of an answer; None without one or when it never ends."""
    found = [m for m in _BLOCK.findall(answer) if m[0].lower() in ("", "python", "py", "python3")]
    return found[-1][1] if found else None


class Code:
    """The program in the answer must pass every test in ``metadata["tests"]``.

    Tests are ``{"inputs": [...], "outputs": [...]}`` (stdin and stdout; with ``"fn_name"`` the
    arguments and results of a function), or a list of ``{"input": ..., "output": ...}``, as
    objects or JSON text; or ``assert`` statements: a list of them in ``test_list`` or ``tests``
    (MBPP), or ``test`` and ``entry_point`` (HumanEval). Expected results never enter the sandbox,
    so that a program cannot print its own verdict; asserts.py says where that cannot be had.

    Args:
        backend: runs (program, stdin) and returns a ``Run``: ``Bubblewrap()``, your own callable
            to another machine, or ``UnsafeSubprocess()``. None, the default: nothing is run, and
            every verdict is "unknown: code verification is off".
        most: tests run at most; the first that fails ends the check.
        retries: of a run that the sandbox, not the program, failed.
    """

    def __init__(self, backend: Backend | None = None, *, most: int = 20, retries: int = 1) -> None:
        self.backend = backend
        self.most = most
        self.retries = retries

    def __repr__(self) -> str:
        return f"Code({self.backend!r}, most={self.most})"

    def __call__(self, trace: Trace) -> Verdict:
        if self.backend is None:
            return Verdict(UNKNOWN, "code verification is off")
        tests, asserted = read_tests(trace.metadata), read_asserts(trace.metadata)
        if asserted is None and (not tests or not tests["inputs"]):
            return Verdict(UNKNOWN, "no tests")
        program = extract_program(trace.answer)
        if program is None:
            fenced = "```" in trace.answer
            return Verdict(WRONG, "unterminated code fence" if fenced else "no code in the answer")
        if asserted is not None:
            return self._asserts(program, asserted)
        assert tests is not None
        inputs, outputs = tests["inputs"][: self.most], tests["outputs"][: self.most]
        if tests.get("fn_name"):
            return self._calls(program, str(tests["fn_name"]), inputs, outputs)
        for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=False)):
            run = self._run(program, _as_text(given))
            failed = _failure(run)
            if failed is None and not same_output(run.stdout, _as_text(wanted)):
                failed = (WRONG, "wrong output", f"{run.stdout[:80]!r}, not {wanted!r:.80}")
            if failed is not None:
                status, reason, detail = failed
                return Verdict(status, reason, run.seconds, f"test {number}: {detail}")
        return Verdict(CORRECT, extra={"tests": len(inputs)})

    def _calls(self, program: str, name: str, inputs: Any, outputs: Any) -> Verdict:
        nonce = secrets.token_hex(16)
        request = {"program": program, "name": name, "calls": inputs, "nonce": nonce}
        run = self._run(_CALL, json.dumps(request) + "\n")
        lines = [line for line in run.stdout.splitlines() if line.startswith(nonce)]
        for number, (line, wanted) in enumerate(zip(lines, outputs, strict=False)):
            try:
                found = json.loads(line.removeprefix(nonce))
            except ValueError:
                return Verdict(WRONG, "wrong result", run.seconds, f"test {number}: not JSON")
            if found != wanted and [found] != wanted:
                detail = f"test {number}: {found!r:.80}, not {wanted!r:.80}"
                return Verdict(WRONG, "wrong result", run.seconds, detail)
        if len(lines) == len(outputs) and run.status == "done":
            return Verdict(CORRECT, seconds=run.seconds, extra={"tests": len(outputs)})
        failed = _failure(run) or (WRONG, "stopped early", f"{len(lines)} of {len(outputs)} tests")
        return Verdict(failed[0], failed[1], run.seconds, failed[2])

    def _asserts(self, program: str, asserted: Asserts) -> Verdict:
        asserted = dataclasses.replace(asserted, tests=asserted.tests[: self.most])
        request, nonce = asserted.request(program)
        run = self._run(RUNNER, request)
        lines = [line for line in run.stdout.splitlines() if line.startswith(nonce)]
        for test, line in zip(asserted.tests, lines, strict=False):
            try:
                kind, said = json.loads(line.removeprefix(nonce))
            except (ValueError, TypeError):
                kind, said = "raised", "not JSON"
            if kind == "held" if test.inside else kind == "value" and same(said, test.wanted):
                continue
            detail = f"{test.source[:120]}: {said!s:.120}"
            if not test.inside and kind == "value":
                detail += f", not {test.wanted!r:.80}"
            return Verdict(WRONG, "assertion failed", run.seconds, detail)
        if len(lines) == len(asserted.tests) and run.status == "done":
            inside = sum(test.inside for test in asserted.tests)
            extra = {"tests": len(lines), **({"asserted_inside": inside} if inside else {})}
            return Verdict(CORRECT, seconds=run.seconds, extra=extra)
        counted = f"{len(lines)} of {len(asserted.tests)} tests"
        failed = _failure(run) or (WRONG, "stopped early", counted)
        return Verdict(failed[0], failed[1], run.seconds, failed[2])

    def _run(self, program: str, stdin: str) -> Run:
        assert self.backend is not None
        run = self.backend(program, stdin)
        for _ in range(self.retries):
            if run.status != "sandbox error":
                break
            run = self.backend(program, stdin)
        return run


def _failure(run: Run) -> tuple[str, str, str] | None:
    if run.status == "sandbox error":
        return ERROR, "sandbox error", run.stderr[-200:]
    if run.status != "done":
        return WRONG, run.status, ""
    if run.code:
        return WRONG, "program crashed", f"status {run.code}: {run.stderr[-200:]}"
    return None


def read_tests(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tests of a record as {"inputs", "outputs"[, "fn_name"]}; None where there are none."""
    for key in ("tests", "test_cases", "input_output"):
        tests = metadata.get(key)
        if isinstance(tests, str):
            try:
                tests = json.loads(tests)
            except ValueError:
                continue
        if isinstance(tests, Mapping) and isinstance(tests.get("inputs"), list):
            return dict(tests)
        if isinstance(tests, list) and all(isinstance(test, Mapping) for test in tests) and tests:
            both = {f"{key}s": [test.get(key, "") for test in tests] for key in ("input", "output")}
            return both
    return None


def same_output(found: str, wanted: str) -> bool:
    """Equal line by line, but for spaces and empty lines at the ends of both."""
    left, right = ([line.split() for line in text.strip().splitlines()] for text in (found, wanted))
    return left == right


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else str(value)
