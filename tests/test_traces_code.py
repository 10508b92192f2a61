"""Verdicts on programs: a table labelled by hand, and the verifier's options and backends."""

import json
import os
import time

import pytest
from traces_code_cases import ASSERTS, CASES, HUMAN, LOOP, READ, SQUARE, SUM, F, fence

from kd.cli.main import main
from kd.sandbox import Bubblewrap, Limits, Run, UnsafeSubprocess
from kd.traces import Trace, verify
from kd.traces.verifiers.code import Code, packages
from kd.traces.verifiers.code.programs import find_program
from kd.traces.verifiers.code.values import (
    RAISED,
    Unreadable,
    close,
    decode,
    read,
    same,
    same_output,
)

try:
    SANDBOX, CLOSED = Bubblewrap(Limits(seconds=3.0)), ""
except OSError as error:
    SANDBOX, CLOSED = None, str(error)
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason=CLOSED)


def answered(text, **metadata):
    return Trace("q", "t", text, metadata=metadata)


@needs_sandbox
@pytest.mark.parametrize("group", sorted({name.split(":")[0] for name, *_ in CASES}))
def test_verdicts_are_the_labelled_ones(group):
    verify_all = Code(SANDBOX)
    off = []
    for name, answer, metadata, wanted in CASES:
        if not name.startswith(f"{group}:"):
            continue
        if "numpy" in answer + str(metadata) and "numpy" in (packages.modules(SANDBOX) or ()):
            continue  # it is installed there, so nothing is missing
        verdict = verify_all(answered(answer, **metadata))
        status, reason = (wanted, None) if isinstance(wanted, str) else wanted
        if verdict.status != status or reason not in (None, verdict.reason):
            off.append(f"{name}: {verdict.label()} ({verdict.detail[:150]}), not {wanted}")
    assert not off, "\n".join(off)


def test_the_table_is_large_and_has_every_status():
    labels = [each[3] if isinstance(each[3], str) else each[3][0] for each in CASES]
    assert len(CASES) >= 200 and min(map(labels.count, ("correct", "wrong", "unknown"))) >= 25
    assert len({name for name, *_ in CASES}) == len(CASES)


@needs_sandbox
def test_tests_past_the_limit_are_named():
    tests = {"inputs": [f"{i} 1" for i in range(57)], "outputs": [str(i + 1) for i in range(57)]}
    verdict = Code(SANDBOX, most=20)(answered(fence(READ), tests=tests))
    assert verdict.correct and verdict.detail == "20 of 57 tests run"
    assert verdict.extra == {"tests": 20, "of": 57}
    late = {**tests, "outputs": [*tests["outputs"][:25], "0", *tests["outputs"][26:]]}
    assert Code(SANDBOX)(answered(fence(READ), tests=late)).detail.startswith("test 25: ")
    several = ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9"]
    verdict = Code(SANDBOX, most=2)(answered(fence(F), test_list=several))
    assert verdict.correct and verdict.detail == "2 of 3 tests run"
    with pytest.raises(ValueError, match="most must be at least 1 or None, got 0"):
        Code(SANDBOX, most=0)


@needs_sandbox
def test_tests_inside_count_when_they_are_trusted():
    loop = {"test": LOOP, "entry_point": "f"}
    trusting = Code(SANDBOX, trust_inside_tests=True)
    verdict = trusting(answered(fence(F), **loop))
    assert verdict.correct and verdict.extra == {"tests": 1, "asserted_inside": 1}
    assert not trusting(answered(fence("def f(x): return 0"), **loop)).correct
    verdict = Code(SANDBOX)(answered(fence(F), **loop))
    assert verdict.detail == "1 of 1 tests hold, but run beside the program"
    assert repr(trusting) != repr(Code(SANDBOX)), "a journal tells them apart"


@needs_sandbox
def test_the_time_limit_is_one_of_a_test_not_of_all():
    slow = "import time\ndef f(x):\n    time.sleep(0.5)\n    return x * x"
    tests = {"fn_name": "f", "inputs": [[1], [2], [3]], "outputs": [1, 4, 9]}
    brief = Code(Bubblewrap(Limits(seconds=1.3)))
    assert brief(answered(fence(slow), tests=tests)).correct
    data = "\n".join(["x = [2]", *["assert f(x[0]) == 4"] * 3])
    assert brief(answered(fence(slow), tests=data)).correct
    endless = "def f(x):\n    while x == 3: pass\n    return x * x"
    verdict = brief(answered(fence(endless), tests=tests))
    assert verdict.label() == "wrong: time limit" and verdict.detail.startswith("test 2")


@needs_sandbox
def test_a_result_that_the_output_limit_cuts_is_not_wrong():
    small = Code(Bubblewrap(Limits(output=2000)))
    wanted = {"fn_name": "f", "inputs": [[]], "outputs": ["x" * 3000]}
    verdict = small(answered(fence("def f(): return 'x' * 3000"), tests=wanted))
    assert verdict.label() == "unknown: result too large"
    text = {"inputs": [""], "outputs": ["x" * 3000]}
    assert small(answered(fence("print('x' * 3000)"), tests=text)).status == "unknown"
    text = {"inputs": [""], "outputs": ["x"]}
    assert small(answered(fence("print('x' * 3000)"), tests=text)).label() == "wrong: output limit"


@needs_sandbox
def test_set_up_that_fails_by_itself_is_not_the_programs_fault():
    for setup in ("raise ValueError('no data')", "open('/data/graph.json')", "import os.nothing"):
        verdict = Code(SANDBOX)(
            answered(fence(F), test_list=["assert f(2) == 4"], test_setup_code=setup)
        )
        assert verdict.label() == "unknown: tests cannot be run", verdict


@needs_sandbox
def test_many_at_once_get_the_verdicts_of_one_by_one():
    traces, wanted = [], []
    for i in range(12):
        tests = {"fn_name": "f", "inputs": [[i], [2]], "outputs": [i * i, 4]}
        traces += [
            answered(fence(F), tests=tests),
            answered(fence("def f(x): return 5"), tests=tests),
        ]
        wanted += ["correct", "wrong"]
    kept, report = verify(traces, Code(SANDBOX), keep=("correct", "wrong"), workers=4)
    assert [t.metadata["verdict"]["status"] for t in kept] == wanted, report.table()


def test_code_is_not_run_unless_asked_for():
    assert Code()(answered(fence(READ), **SUM)).label() == "unknown: code verification is off"


def test_what_the_sandbox_does_wrong_is_not_the_programs_fault():
    for tests in (SUM, SQUARE, ASSERTS, HUMAN):
        asked = []

        def broken(program, stdin, asked=asked):
            asked.append(program)
            return Run("sandbox error", stderr="no namespaces")

        verdict = Code(broken)(answered(fence(F + "\n" + READ), **tests))
        assert verdict.label() == "error: sandbox error" and len(asked) >= 2


def test_a_remote_backend_is_any_callable():
    remote = Code(lambda program, stdin: Run("done", 0, stdin.upper()))
    tests = [{"input": "a", "output": "A"}, {"input": "b", "output": "B"}]
    assert remote(answered(fence("whatever"), tests=tests)).correct
    # it cannot say what is installed there: an import alone decides nothing
    assert remote(answered(fence("import numpy"), tests=tests)).correct


@pytest.mark.parametrize("tests", [SQUARE, ASSERTS, HUMAN])
def test_the_unsafe_backend_runs_them_too(tests):
    assert Code(UnsafeSubprocess(Limits(seconds=20)))(answered(fence(F), **tests)).correct


def test_pickled_tests_are_never_opened(tmp_path):
    """Opening this one would leave a file behind."""
    import base64
    import pickle
    import zlib

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    packed = pickle.dumps(Trap())
    for content in (packed, base64.b64encode(zlib.compress(packed)).decode()):
        verdict = Code(lambda *_: Run("done", 0))(answered(fence(READ), private_test_cases=content))
        assert verdict.label() == "unknown: tests cannot be read" and "pickle" in verdict.detail
    assert not (tmp_path / "opened").exists()
    pickle.loads(packed)
    assert (tmp_path / "opened").exists(), "the trap would have shown it"


@needs_sandbox
def test_the_command_line_reaches_every_option(tmp_path, capsys):
    rows = [
        {
            "prompt": "q",
            "think": "t",
            "answer": fence(F),
            "metadata": {"test": LOOP, "entry_point": "f"},
        }
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "traces",
        "verify",
        str(source),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--verifier",
        "code",
    ]
    command += ["--run-code", "sandbox", "--keep", "correct", "unknown"]
    statuses = []
    for options in ([], ["--trust-inside-tests"], ["--most-tests", "1"]):
        assert main([*command, *options]) == 0
        (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        statuses.append(row["metadata"]["verdict"]["status"])
    assert statuses == ["unknown", "correct", "unknown"]


DEEP = "x" + "()" * 1500


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef f(\n" + "\n" * 190_000 + "```",
        "```python\n(\n" * 15_000,
        "```python\n(\n" * 10_000 + "```\n" * 20,
        "```python\n```\n" * 12_000,
        "~~~\n`````python\n(\n" * 8_000 + "```",
        fence("(" * 190_000),
        fence("import numpy\n" + DEEP),
        fence("import numpy\n" + "-" * 150_000 + "1"),
        fence("x" + ".a" * 90_000),
        fence("try:\n    import numpy\nexcept " + "a" + "()" * 500 + ": pass"),
        "x = 1\n" * 8_000 + "(",
        "a" * 190_000,
        "> " * 90_000 + "```",
        "1. " * 60_000,
        fence("\n".join(f"def f{i}(): return f{i + 1}()" for i in range(4_000))),
        "\n".join(fence(f"def f{i}(): return f{i + 1}()") for i in range(3_000)),
    ],
    ids=range(16),
)
def test_hostile_sources_end_soon_and_never_break_the_check(answer):
    """The check itself is meant: what would run answers that the program crashed."""
    crashed = Code(lambda *_: Run("done", 1, stderr="crashed"))
    started = time.process_time()
    for tests in (SQUARE, SUM, HUMAN):
        assert crashed(answered(answer, **tests)).status in ("wrong", "unknown")
    assert time.process_time() - started < 20


def test_programs_are_joined_in_the_order_of_the_answer():
    parts = ["import math", "def g(x): return math.sqrt(x)", "def f(x): return g(x)"]
    found = find_program("\n".join(map(fence, parts)), {"f"}).program
    assert found.index("import math") < found.index("def g") < found.index("def f")


@pytest.mark.parametrize(
    ("found", "wanted", "equal"),
    [
        (0.1 + 0.2, 0.3, True),
        (2.5, 2.5000001, False),
        (1 / 3, 0.33333, True),
        (1 / 3, 0.3333, False),
        (12345678.51, 12345678.5, False),
        (1e20 + 2e4, 1e20, True),
        (3, 3.0, True),
        (2.9999999999999996, 3, False),
        (2.9999999999999996, 3.0, True),
        (float("nan"), float("nan"), False),
        (float("inf"), float("inf"), True),
        (-0.0, 0.0, True),
        (1e-300, 2e-300, False),
        ("1.0", 1.0, False),
    ],
)
def test_floats_are_close_or_not(found, wanted, equal):
    assert close(found, wanted) is equal


def test_values_are_equal_as_python_has_it():
    assert same([1, (2, 0.1 + 0.2)], [1, (2, 0.3)]) and not same([1], (1,))
    assert same((1, [2]), [1, [2]], json_like=True) and not same({1}, [1], json_like=True)
    assert same({1: 0.1 + 0.2}, {"1": 0.3}, json_like=True) and not same({1: 2}, {"1": 2})
    assert not same([1, 2], [1]) and not same({"a": 1}, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("found", "wanted", "equal"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("  1   2  \n\n", "1 2", True),
        ("1\n2", "1 2", False),
        ("0.333333333", "0.33333", True),
        ("1.50", "1.5", True),
        ("2", "2.0", True),
        ("2.0", "2", False),
        ("011", "11", False),
        ("YES", "yes", False),
        ("nan", "0.5", False),
        ("1e400", "0.5", False),
        ("9" * 5000, "0.5", False),
    ],
)
def test_outputs_are_compared_word_by_word(found, wanted, equal):
    assert same_output(found, wanted) is equal


@pytest.mark.parametrize(
    "code",
    [["list"], ["list", 3], ["int", "x"], ["dict", [[1]]], ["bytes", "zz"], [], {}, ["range", "a"]],
)
def test_what_stands_for_no_value_is_unreadable(code):
    with pytest.raises(Unreadable):
        decode(code)


def test_deep_json_is_unreadable_and_nothing_else_escapes():
    for line in ("[" * 100_000, "1" * 10_000, "{", "", "\x00"):
        with pytest.raises(Unreadable):
            read(line)
    assert issubclass(Unreadable, RAISED)
