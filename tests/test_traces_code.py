"""Verdicts on programs."""

import pytest

from kd.sandbox import Bubblewrap, Limits, Run
from kd.traces import Trace, verify
from kd.traces.verifiers.code import Code, extract_program

try:
    SANDBOX = Bubblewrap(Limits(seconds=2.0))
    CLOSED = ""
except OSError as error:
    SANDBOX, CLOSED = None, str(error)
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason=CLOSED)

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
