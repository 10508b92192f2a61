"""Hostile programs, themselves bounded, are contained; verdicts on 100 programs are right.

Where bubblewrap cannot run, the verifier stays closed and these tests are skipped with its reason.
"""

import os
import shutil
import subprocess

import pytest

from kd.cli.main import main
from kd.sandbox import HOSTILE, Bubblewrap, Limits, Run, SandboxClosed, UnsafeSubprocess, hostile
from kd.traces import Trace, verify
from kd.traces.verifiers.code import Code, extract_program

try:
    SANDBOX = Bubblewrap(Limits(seconds=2.0))
    CLOSED = ""
except OSError as error:
    SANDBOX, CLOSED = None, str(error)
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason=CLOSED)


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name):
    run = SANDBOX(HOSTILE[name].program)
    assert HOSTILE[name].contained(run) and run.seconds < 3.5, run


@needs_sandbox
def test_the_command_prints_the_table(monkeypatch, capsys):
    few = {name: HOSTILE[name] for name in ("memory", "network", "huge output")}
    monkeypatch.setattr(hostile, "HOSTILE", few)
    assert main(["traces", "sandbox"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| contained |") == 3 and "NOT" not in shown
    few["a lie"] = hostile.Hostile("print('out')", "nothing", "in")
    assert main(["traces", "sandbox"]) == 1
    assert "| a lie | nothing | `out` |" in capsys.readouterr().out


@needs_sandbox
def test_nothing_outlives_a_run():
    if shutil.which("pgrep") is None:
        pytest.skip("pgrep is not installed")
    mark = "kdmark4711"
    run = SANDBOX(f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{mark}')\ntime.sleep(5)")
    assert run.status == "time limit"
    found = subprocess.run(["pgrep", mark], capture_output=True, text=True)
    assert not found.stdout.strip()


@needs_sandbox
def test_crashes_are_the_programs_own_fault():
    assert SANDBOX("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").code != 0
    assert SANDBOX("raise SystemExit(7)").code == 7


ADD = "a, b = map(int, input().split())\nprint(a {} b)"


def answered(program, tests):
    return Trace("q", "t", f"```python\n{program}\n```", metadata={"tests": tests})


@needs_sandbox
def test_the_verdicts_of_100_programs_are_right():
    traces, wanted = [], []
    for i in range(25):
        stdin = {"inputs": [f"{i} 3\n", "2 5\n"], "outputs": [f"{i + 3}\n", "7\n"]}
        calls = {"fn_name": "f", "inputs": [[i], [2]], "outputs": [i * i, 4]}
        traces += [answered(ADD.format("+"), stdin), answered(ADD.format("-"), stdin)]
        traces += [
            answered("def f(x):\n    print('noise')\n    return x * x", calls),
            answered("class Solution:\n    def f(self, x): return x * x + 1", calls),
        ]
        wanted += ["correct", "wrong", "correct", "wrong"]
    kept, report = verify(traces, Code(SANDBOX), keep=("correct", "wrong"), workers=2)
    assert [t.metadata["verdict"]["status"] for t in kept] == wanted, report.table()


@needs_sandbox
def test_a_program_cannot_print_its_own_verdict():
    forger = (
        "import sys, json\nprint(json.dumps('PASS'))\nsys.stderr.write('PASS')\n"
        "def f(x):\n    sys.__stdout__.write('4\\n' * 3); raise SystemExit(0)"
    )
    tests = {"fn_name": "f", "inputs": [[2], [3]], "outputs": [4, 9]}
    verdict = Code(SANDBOX)(answered(forger, tests))
    assert verdict.status == "wrong"


def test_code_is_not_run_unless_asked_for():
    verdict = Code()(answered("print(1)", {"inputs": [""], "outputs": ["1"]}))
    assert verdict.label() == "unknown: code verification is off"


def test_a_missing_or_leaking_sandbox_is_closed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxClosed, match="bwrap must be installed"):
        Bubblewrap()
    # a fake bwrap that isolates nothing: the canary gets through, and nothing is ever run in it
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\nexec /usr/bin/python3 /proc/self/fd/"$KD" 2>/dev/null\n')
    fake.chmod(0o755)
    if os.path.exists("/usr/bin/python3"):
        with pytest.raises(SandboxClosed):
            Bubblewrap(bwrap=str(fake))


def test_what_the_sandbox_does_wrong_is_not_the_programs_fault():
    asked = []

    def broken(program, stdin):
        asked.append(program)
        return Run("sandbox error", stderr="no namespaces")

    verdict = Code(broken)(answered("print(1)", {"inputs": [""], "outputs": ["1"]}))
    assert verdict.label() == "error: sandbox error" and len(asked) == 2


def test_a_remote_backend_is_any_callable_and_answers_without_code_are_wrong():
    remote = Code(lambda program, stdin: Run("done", 0, stdin.upper()))
    tests = [{"input": "a", "output": "A"}, {"input": "b", "output": "B"}]
    assert remote(answered("whatever", tests)).correct
    unfinished = Trace("q", "t", "```python\nprint(1)", metadata={"tests": tests})
    assert remote(unfinished).reason == "unterminated code fence"
    assert (
        remote(Trace("q", "t", "no", metadata={"tests": tests})).reason == "no code in the answer"
    )
    assert remote(Trace("q", "t", "```\n1\n```")).label() == "unknown: no tests"
    assert extract_program("```python\na\n```\ntext\n```py\nb\n```") == "b\n"


def test_the_unsafe_backend_says_so_and_still_bounds_time():
    run = UnsafeSubprocess(Limits(seconds=0.5))("import time; time.sleep(5)")
    assert run.status == "time limit"
