"""Has a program run in the backend, on an input or beside runner.py, and says why it failed."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kd.sandbox import Run
from kd.traces.verifiers.code import packages
from kd.traces.verifiers.code.values import Unreadable, read, shown
from kd.traces.verifiers.verdict import ERROR, UNKNOWN, WRONG

Backend = Callable[[str, str], Run]
_RUNNER = Path(__file__).with_name("runner.py")


@dataclass(frozen=True)
class Failed:
    """Why a test failed.

    Attributes:
        reason: a short fixed phrase.
        detail: what was special here.
        error: "Type: message" of the exception, or the end of stderr.
        line: of the program, the last one that the exception came through; 0 for none.
        status: what that makes of the verdict.
    """

    reason: str
    detail: str = ""
    error: str = ""
    line: int = 0
    status: str = WRONG


@dataclass
class Asked:
    """The answers to some steps, and how the last run of them ended."""

    answers: list[Any] = field(default_factory=list)
    run: Run = Run("done")


class Trials:
    """Runs of one backend.

    Args:
        backend: runs (program, stdin).
        retries: of a run that the sandbox, not the program, failed.
    """

    def __init__(self, backend: Backend, retries: int) -> None:
        self.backend, self.retries = backend, retries
        self._modules: frozenset[str] | None = None
        self._listed = False

    def run(self, program: str, stdin: str) -> Run:
        """Run a program on an input."""
        run = self.backend(program, stdin)
        for _ in range(self.retries):
            if run.status != "sandbox error":
                break
            run = self.backend(program, stdin)
        return run

    def ask(self, program: str, steps: list[Any], *, setup: str, name: str) -> Asked:
        """Have steps answered. Where the time ends after some answers, the rest is asked again in
        a run of its own, so that the limit is one of a test and not of all."""
        asked, again, seconds = Asked(), True, 0.0
        request: dict[str, Any] = {"setup": setup, "program": program, "name": name}
        while again:
            done = len(asked.answers)
            before = [step for step in steps[:done] if step[0] == "run"]  # they prepare the rest
            nonce = secrets.token_hex(16)
            request |= {"nonce": nonce, "steps": before + steps[done:]}
            asked.run = self.run(_RUNNER.read_text(), json.dumps(request) + "\n")
            seconds += asked.run.seconds
            whole = asked.run.stdout.split("\n")[:-1]
            said = [_said(line.removeprefix(nonce)) for line in whole if line.startswith(nonce)]
            new = said if _is_broken(said) else said[len(before) :]
            asked.answers += new
            late = asked.run.status == "time limit"
            again = late and bool(new) and len(asked.answers) < len(steps)
        asked.run = replace(asked.run, seconds=seconds)
        return asked

    def available(self, *sources: str) -> frozenset[str] | None:
        """What can be imported in the sandbox; asked once, and only for who imports something."""
        if not self._listed and any(packages.Imports(source).lines for source in sources):
            self._modules, self._listed = packages.modules(self.backend), True
        return self._modules


def _said(line: str) -> Any:
    try:
        return read(line)
    except Unreadable as error:
        return ["unreadable", str(error)]


def _is_broken(answers: list[Any]) -> bool:
    return bool(answers) and isinstance(answers[0], list) and answers[0][:1] == ["broken"]


def unanswered(asked: Asked, number: int, kind: str) -> Failed | None:
    """Why a step has no answer of this kind; None where it has."""
    answers = asked.answers
    if _is_broken(answers):
        number = 0
    if number >= len(answers):
        failed = failure(asked.run)
        return failed or Failed("stopped early", f"{len(answers)} tests answered")
    said = answers[number]
    if isinstance(said, list) and said and said[0] == kind and len(said) <= 2:
        return None
    if isinstance(said, list) and len(said) == 3 and said[0] in ("raised", "broken"):
        error, line = shown(said[1], 200), said[2] if isinstance(said[2], int) else 0
        return Failed("program crashed" if said[0] == "broken" else "raised", error, error, line)
    return Failed("unreadable result", shown(said))


def failure(run: Run) -> Failed | None:
    """Why a run did not end well; None where it did."""
    if run.status == "sandbox error":
        return Failed("sandbox error", run.stderr[-200:], status=ERROR)
    if run.status != "done":
        return Failed(run.status)
    if run.code:
        # the last frame that is the program's own
        frames = r'^  File "(?!<|[^"\n]*/lib/python)[^"\n]*", line (\d{1,9})'
        lines = re.findall(frames, run.stderr, re.MULTILINE)
        line = int(lines[-1]) if lines else 0
        detail = f"status {run.code}: {run.stderr[-200:]}"
        return Failed("program crashed", detail, run.stderr[-2000:], line)
    return None


def too_large(failed: Failed, wanted: Any, backend: Any) -> Failed:
    """A wanted result that the output limit does not let through says nothing of the program."""
    limit = getattr(getattr(backend, "limits", None), "output", None)
    if failed.reason != "output limit" or limit is None:
        return failed
    size = len(wanted if isinstance(wanted, str) else json.dumps(wanted))
    if size < limit // 2:
        return failed
    detail = f"{size} characters are wanted, {limit} bytes of output allowed"
    return replace(failed, status=UNKNOWN, reason="result too large", detail=detail)
