"""Tests written as assert statements: MBPP's lists and HumanEval's check function."""

import pytest

from kd.sandbox import Bubblewrap, Limits, UnsafeSubprocess
from kd.traces import Trace, verify
from kd.traces.verifiers.asserts import assertions, literal, read_asserts, same
from kd.traces.verifiers.code import Code

try:
    SANDBOX = Bubblewrap(Limits(seconds=3.0))
    CLOSED = ""
except OSError as error:
    SANDBOX, CLOSED = None, str(error)
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason=CLOSED)

SQUARE = "def f(x):\n    print('noise')\n    return x * x"
CUBE = "def f(x): return x * x * x"
CHECK = (
    "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
    "    assert abs(candidate(1.5) - 2.25) < 1e-6\n    assert candidate(3) == 9, 'three'\n"
)
LOOP = "def check(candidate):\n    for i in range(5):\n        assert candidate(i) == i * i\n"


def answered(program, **metadata):
    return Trace("q", "t", f"```python\n{program}\n```", metadata=metadata)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("assert f(1) == [1, 'a']", [("f(1)", [1, "a"])]),
        ("assert 3 == f(1)", [("f(1)", 3)]),
        ("assert f(2) is None", [("f(2)", None)]),
        ("assert set(f(2)) == set()", [("set(f(2))", set())]),
        ("assert f(-1) == -1.5\nassert f(0) == (0,)", [("f(-1)", -1.5), ("f(0)", (0,))]),
    ],
)
def test_what_is_wanted_is_taken_out_of_the_test(text, found):
    assert [(test.source, test.wanted) for test in assertions(text)] == found
    assert not any(test.inside for test in assertions(text))


@pytest.mark.parametrize(
    "text",
    [
        "assert f(1)",
        "assert not f(1)",
        "assert f(1) == g(1)",
        "x = 1\nassert f(x) == 1",
        "assert f(1) in (1, 2)",
        "assert abs(f(1) - 2.5) < 1e-6",
        "assert (",
    ],
)
def test_what_cannot_be_taken_apart_is_run_as_it_is(text):
    (test,) = assertions(text)
    assert test.inside


def test_records_of_both_shapes_are_read():
    listed = read_asserts({"test_list": ["assert f(1) == 1"], "test_imports": ["import math"]})
    assert listed.setup == "import math" and len(listed.tests) == 1
    check = read_asserts({"test": CHECK, "entry_point": "f"})
    assert len(check.tests) == 3 and check.name == "f" and "METADATA" in check.setup
    assert check.tests[0].wanted == 4
    assert read_asserts({"test": LOOP, "entry_point": "f"}).tests[0].inside
    for record in ({}, {"tests": [{"input": 1}]}, {"test": "nothing"}, {"test_list": []}):
        assert read_asserts(record) is None


def test_values_are_compared_as_values():
    assert same("[1, 2.0]", [1, 2]) and same("{1, 2}", {2, 1}) and same("set()", set())
    assert not same("[1", [1]) and not same("<f at 0x1>", 1) and not same("(1,)", [1])
    assert not same("(" * 5000, 1) and literal("f()") is not None


@needs_sandbox
def test_programs_are_judged_by_their_assertions():
    metadata = [
        {"test_list": ["assert f(2) == 4", "assert f(-3) == 9", "assert f(0) == 0"]},
        {"test": CHECK, "entry_point": "f"},
        {"test": LOOP, "entry_point": "f"},
        {"tests": ["assert math.isclose(f(2), 4.0)"], "test_setup_code": "import math"},
    ]
    traces = [answered(program, **each) for each in metadata for program in (SQUARE, CUBE)]
    kept, report = verify(traces, Code(SANDBOX), keep=("correct", "wrong"), workers=2)
    assert [t.metadata["verdict"]["status"] for t in kept] == ["correct", "wrong"] * 4
    assert kept[0].metadata["verdict"]["extra"] == {"tests": 3}
    assert kept[4].metadata["verdict"]["extra"] == {"tests": 1, "asserted_inside": 1}
    assert "f(2): 8, not 4" in kept[1].metadata["verdict"]["detail"]
    assert kept[2].metadata["verdict"]["extra"] == {"tests": 3, "asserted_inside": 1}


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit(0)", "stopped early"),
        ("def g(x): return 4", "assertion failed"),
        ("def f(x): raise ValueError('no')", "assertion failed"),
        ("import os\ndef f(x): os._exit(0)", "stopped early"),
        ("def f(x):\n    while True: pass", "time limit"),
        ("class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()", None),
        ("def f(x:", "program crashed"),
    ],
)
def test_programs_that_cheat_or_break_are_wrong(program, reason):
    verdict = Code(SANDBOX)(answered(program, test_list=["assert f(2) == 4"]))
    assert verdict.status == "wrong" and verdict.reason == (reason or "assertion failed")


def test_the_unsafe_backend_runs_them_too():
    good = answered(SQUARE, test_list=["assert f(2) == 4"])
    assert Code(UnsafeSubprocess(Limits(seconds=10)))(good).correct
