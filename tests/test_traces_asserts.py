"""Tests written as assert statements: what of them is taken out of the sandbox, and how."""

import ast

import pytest

from kd.traces.verifiers.code.asserts import Refused, read_asserts
from kd.traces.verifiers.code.expressions import Inside, plan
from kd.traces.verifiers.code.values import RAISED, Opaque

CHECK = (
    "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
    "    assert abs(candidate(1.5) - 2.25) < 1e-6\n    assert candidate(3) == 9, 'three'\n"
)


def planned(text, **names):
    return plan(ast.parse(text).body[0].test, **names)


@pytest.mark.parametrize(
    ("text", "hole", "right", "wrong"),
    [
        ("assert f(1) == [1, 'a']", "f(1)", [1, "a"], (1, "a")),
        ("assert 3 == f(1)", "f(1)", 3, 4),
        ("assert f(2) is None", "f(2)", None, 0),
        ("assert f(2) is True", "f(2)", True, 1),
        ("assert set(f(2)) == set()", "f(2)", [], [1]),
        ("assert f(-1) == -1.5", "f(-1)", -1.5, 1.5),
        ("assert abs(f(1.5) - 2.25) < 1e-6", "f(1.5)", 2.2500001, 2.3),
        ("assert math.isclose(f(2), 4.0, rel_tol=0.1)", "f(2)", 4.1, 5),
        ("assert f(1)", "f(1)", [0], []),
        ("assert not f(1)", "f(1)", 0, 1),
        ("assert f(1) in (1, 2)", "f(1)", 2, 3),
        ("assert 3 in f(1)", "f(1)", [3], [4]),
        ("assert 1 < f(1) <= 3", "f(1)", 3, 1),
        ("assert f(1) != 3", "f(1)", 4, 3),
        ("assert f(1)[0] == 5", "f(1)", [5], [6]),
        ("assert f(1)['a'][-1] == 5", "f(1)", {"a": [5]}, {"a": [6]}),
        ("assert len(f(1)) == 2 and f(1)", "f(1)", [1, 2], [1]),
        ("assert sorted(f(1), reverse=True) == [3, 1]", "f(1)", [1, 3], [1, 2]),
        ("assert f(1) == 2**10 - 1", "f(1)", 1023, 1024),
        ("assert f(1) == [0] * 3", "f(1)", [0, 0, 0], [0]),
        ("assert round(f(1), 2) == 0.33", "f(1)", 1 / 3, 0.34),
        ("assert Solution().f(1) == 2", "Solution().f(1)", 2, 3),
        ("assert f(g(1)) == 2", "f(g(1))", 2, 3),
        ("assert f(sorted([2, 1])) == 2", "f(sorted([2, 1]))", 2, 3),
        ("assert isinstance(f(1), (int, str))", "f(1)", "a", 1.5),
        ("assert f(1) == {**{}, 'a': 1} or f(1) == 7", None, None, None),
        ("assert str(f(1)) == '4'", "str(f(1))", "4", "5"),
        ("assert [f(i) for i in range(2)] == [0, 1]", "[f(i) for i in range(2)]", [0, 1], [1]),
    ],
)
def test_what_is_wanted_is_taken_out_of_the_test(text, hole, right, wrong):
    if hole is None:
        with pytest.raises(Inside):
            planned(text)
        return
    made = planned(text)
    assert set(made.holes) == {hole}
    assert made.holds([right] * len(made.holes)) and not made.holds([wrong] * len(made.holes))


@pytest.mark.parametrize(
    "text",
    [
        "assert f(1) == g(1)",
        "assert f(1).startswith('a')",
        "assert all(f(i) == i for i in range(3))",
        "assert f(any([1])) == 1",
        "assert (lambda x: x)(f(1)) == 1",
        "assert (f(1) if f(2) else 3) == 3",
        "assert f",
        "assert 1 == 1",
        "assert len([1]) == 1",
        "assert f(1) == 1 / 0",
        "assert f(1) == 9**9**9",
        "assert f(1) == list(range(10**9))",
        "assert reference(f(1)) == 3",
        "assert f(1) == expected",
        "assert f'{f(1)}' == '1'",
        "assert type(f(1)) == int",
        "assert f(1) == Point(1)",
        "assert (x := f(1)) == 1",
    ],
)
def test_what_the_program_could_decide_is_run_inside(text):
    with pytest.raises(Inside):
        planned(text, own={"reference"})


def test_hostile_values_raise_and_never_hold():
    hostile = [Opaque("A", "4"), None, "4", [], {}, float("nan"), 7**4000, b"4"]
    for text in ("assert abs(f(1) - 4) < 1e-6", "assert f(1) + 1 == 5", "assert f(1) * 2 == 8"):
        for value in hostile:
            try:
                held = planned(text).holds([value])
            except RAISED:
                continue
            assert not held
    with pytest.raises(ValueError, match="too large"):
        planned("assert f(1) ** 9999 == 1").holds([7**4000])
    with pytest.raises(ValueError, match="too long"):
        planned("assert f(1) * 'ab' == 1").holds([10**9])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("assert f(1) % 5 == 1", "%999999999d"),
        ("assert f(1) % 5 == 1", "%*d"),
        ("assert set(f(1)) == {1}", [k * (2**61 - 1) for k in range(1, 40_000)]),
        ("assert Counter(f(1)) == {1: 1}", [k * (2**61 - 1) for k in range(1, 40_000)]),
        ("assert Fraction(f(1)) == 1", "1e999999999"),
        ("assert int(Decimal(f(1))) == 1", "1e999999999"),
        ("assert len(list(f(1))) == 1", Opaque("range", "range(10**18)")),
        ("assert f(1)[0] ** 2 == 1", [7**900_000]),
    ],
)
def test_values_that_would_fill_memory_or_time_are_refused(text, value):
    with pytest.raises(RAISED):
        planned(text).holds([value])


def test_repeated_values_are_no_attack():
    assert planned("assert set(f(1)) == {1, 2}").holds([[1, 2] * 1000])
    assert planned("assert Counter(f(1)) == Counter({1: 1000})").holds([[1] * 1000])


def sources(record):
    return [(step.source, step.judges, step.inside) for step in read_asserts(record).steps]


def test_records_of_both_shapes_are_read():
    listed = read_asserts({"test_list": ["assert f(1) == 1"], "test_imports": ["import math"]})
    assert listed.setup.strip() == "import math" and listed.names == {"f"}
    check = read_asserts({"test": CHECK, "entry_point": "f"})
    assert len(check) == 3 and check.name == "f" and "METADATA" in check.setup
    assert not any(step.inside for step in check.tests)
    for record in ({}, {"tests": [{"input": 1}]}, {"test": "nothing"}, {"test_list": []}):
        assert read_asserts(record) is None


def test_preparations_are_no_tests_and_their_variables_can_be_asked_for():
    record = {"tests": "xs = [3, 1]\nf(xs)\nassert xs == [1, 3]\ns = S()\nassert s.get(1) == 2"}
    assert sources(record) == [
        ("xs = [3, 1]", False, False),
        ("f(xs)", False, False),
        ("assert xs == [1, 3]", True, False),
        ("s = S()", False, False),
        ("assert s.get(1) == 2", True, False),
    ]


@pytest.mark.parametrize(
    ("tests", "inside"),
    [
        ("want = [1, 4]\nassert f(2) == want", False),
        ("got = f(2)\nwant = 2 ** 2\nassert got == want", False),
        ("def test_a():\n    want = 1\n    assert f(1) == want\n"
         "def test_b():\n    want = 4\n    assert f(2) == want", False),
        ("eps = 1e-6\nassert abs(f(2) - 4) < eps", False),
        ("want = [1]\ng(want)\nassert f(2) == want", True),
        ("want = [1]\nassert f(want) == want", True),
        ("want = h(1)\nassert f(2) == want", True),
        ("want = f(1) == 1\nassert want", True),
        ("want = 1\nif f(1):\n    want = 2\nassert f(2) == want", True),
        ("want, more = 1, 2\nassert f(2) == want", True),
        ("ok = True\nfor i in range(2):\n    ok = ok and f(i) == i\nassert ok", True),
    ],
)  # fmt: skip
def test_a_wanted_value_in_a_variable_stays_outside(tests, inside):
    judged = [step for step in read_asserts({"tests": tests}).tests if step.source[:6] == "assert"]
    assert judged[-1].inside is inside


def test_helpers_of_the_tests_are_not_trusted():
    record = {"tests": ["assert near(f(1))"], "test_setup_code": "def near(x): return x == 1"}
    assert sources(record) == [("assert near(f(1))", True, True)]
    record = {"tests": ["def near(x):\n    return x == 1", "assert near(f(1))"]}
    assert sources(record)[-1] == ("assert near(f(1))", True, True)
    record = {"tests": ["from helpers import near\nassert near(f(1)) == 1"]}
    assert sources(record)[-1][2]
    record = {"test_list": ["for i in range(3):\n    assert f(i) == i"]}
    assert sources(record)[0][1:] == (True, True)


def test_a_function_named_like_a_plain_one_is_the_one_tested():
    (step,) = read_asserts({"test_list": ["assert sum(10, 15) == 25"]}).steps
    assert step.plan.holes == ("sum(10, 15)",)
    (step,) = read_asserts({"test_list": ["assert sum(f(1)) == 25"]}).steps
    assert step.plan.holes == ("f(1)",)


@pytest.mark.parametrize("test", ["(f(1) == 2, 'two')", "(f(1), 2)", "('f',)"])
def test_assertions_that_are_always_true_are_refused(test):
    with pytest.raises(Refused, match="always true"):
        read_asserts({"test_list": ["assert f(1) == 1", f"assert {test}"]})


def test_the_first_tests_keep_their_preparations():
    record = {"tests": "x = 1\nassert f(x) == 1\ny = 2\nassert f(y) == 2"}
    first = read_asserts(record).first(1)
    assert [step.source for step in first.steps] == ["x = 1", "assert f(x) == 1"] and len(
        first
    ) == 1
