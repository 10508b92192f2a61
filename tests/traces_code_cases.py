"""Answers with programs, their tests, and the verdict that each must get: labelled by hand.

``(name, answer, metadata, verdict)``; a verdict is a status, or a status and a reason.
"""

import base64
import json
import pickle
import zlib


def fence(code, language="python", mark="```"):
    return f"{mark}{language}\n{code}\n{mark}"


SUM = {"tests": {"inputs": ["2 3\n", "10 5\n"], "outputs": ["5\n", "15\n"]}}
SQUARE = {"tests": {"fn_name": "f", "inputs": [[2], [3]], "outputs": [4, 9]}}
ASSERTS = {"test_list": ["assert f(2) == 4", "assert f(3) == 9"]}
READ = "a, b = map(int, input().split())\nprint(a + b)"
OFF = "a, b = map(int, input().split())\nprint(a - b)"
F = "def f(x):\n    return x * x"
G = "def f(x):\n    return x + x"


def returns(value):
    return fence(f"def f():\n    {value}")


def calling(output):
    return {"tests": {"fn_name": "f", "inputs": [[]], "outputs": [output]}}


def listed(*tests, **more):
    return {"test_list": list(tests), **more}


def _pickled(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


HUMAN_PROMPT = (
    "from typing import List\n\n\ndef helper(x):\n    return x + 1\n\n\n"
    'def f(x: int) -> int:\n    """Square.\n    >>> f(2)\n    4\n    """\n'
)
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
NEAR = (
    "def check(candidate):\n    assert abs(candidate(1.5) - 2.25) < 1e-6\n    assert True, 'end'\n"
)
LOOP = "def check(candidate):\n    for i in range(5):\n        assert candidate(i) == i * i\n"
HUMAN = {"test": CHECK, "entry_point": "f"}
LCB = {
    "public_test_cases": json.dumps(
        [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
    ),
    "private_test_cases": json.dumps([{"input": "[]\n3", "output": "3", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "total"}),
}
TOTAL = (
    "class Solution:\n    def total(self, xs: List[int], y: int) -> int:\n"
    "        return sum(xs) + y"
)

EXTRACTION = [
    ("one block", fence(READ), SUM, "correct"),
    ("wrong", fence(OFF), SUM, ("wrong", "wrong output")),
    ("tildes", fence(READ, mark="~~~"), SUM, "correct"),
    ("four marks", fence(READ, mark="````"), SUM, "correct"),
    ("upper case tag", fence(READ, "Python"), SUM, "correct"),
    ("py3 tag", fence(READ, "py3"), SUM, "correct"),
    ("tag with a version", fence(READ, "python3.11"), SUM, "correct"),
    ("tag in braces", fence(READ, "{.python .numberLines}"), SUM, "correct"),
    ("tag with a title", fence(READ, 'python title="a.py"'), SUM, "correct"),
    ("no tag", fence(READ, ""), SUM, "correct"),
    ("CRLF", fence(READ).replace("\n", "\r\n"), SUM, "correct"),
    ("lone CR", fence(READ).replace("\n", "\r"), SUM, "correct"),
    (
        "in a list",
        "1. So:\n\n   ```python\n   a, b = map(int, input().split())\n   print(a + b)\n   ```\n",
        SUM,
        "correct",
    ),
    (
        "in a quotation",
        "> ```python\n> a, b = map(int, input().split())\n> print(a + b)\n> ```\n",
        SUM,
        "correct",
    ),
    ("never closed", "```python\n" + READ, SUM, "correct"),
    (
        "never closed, cut",
        "```python\na, b = map(int, input().split())\nprint(a +",
        SUM,
        ("wrong", "unterminated code fence"),
    ),
    ("no fences", f"The program:\n\n{READ}\n", SUM, "correct"),
    ("no fences, text after", f"{F}\n\nIt squares its argument.", SQUARE, "correct"),
    ("no code", "I cannot do this.", SUM, ("wrong", "no code in the answer")),
    ("a number", "42", SUM, ("wrong", "no code in the answer")),
    (
        "another language",
        fence("int main() { return 0; }", "cpp"),
        SUM,
        ("unknown", "not a Python program"),
    ),
    (
        "use after the program",
        f"{fence(F)}\nUse it:\n{fence('print(f(2))  # 4')}",
        SQUARE,
        "correct",
    ),
    ("use before the program", f"{fence('print(f(2))')}\nwith\n{fence(F)}", SQUARE, "correct"),
    ("output after the program", f"{fence(READ)}\nprints\n{fence('5', '')}", SUM, "correct"),
    (
        "use after a program that reads",
        f"{fence(READ)}\nRun it:\n{fence('print(2 + 3)')}",
        SUM,
        "correct",
    ),
    (
        "shell after the program",
        f"{fence(READ)}\n{fence('python a.py < in', 'bash')}",
        SUM,
        "correct",
    ),
    ("a first attempt, mended", f"{fence(G)}\nNo, that doubles:\n{fence(F)}", SQUARE, "correct"),
    (
        "a right attempt, spoiled",
        f"{fence(F)}\nBetter:\n{fence(G)}",
        SQUARE,
        ("wrong", "wrong result"),
    ),
    (
        "helpers in a block before",
        fence("def g(x):\n    return x * x") + "\nand\n" + fence("def f(x):\n    return g(x)"),
        SQUARE,
        "correct",
    ),
    (
        "imports in a block before",
        fence("import math") + "\nand\n" + fence("def f(x):\n    return math.prod([x, x])"),
        SQUARE,
        "correct",
    ),
    (
        "a helper's demonstration is left out",
        fence("def add(a, b):\n    return a + b\nprint(add(1, 1))")
        + "\nand\n"
        + fence("a, b = map(int, input().split())\nprint(add(a, b))"),
        SUM,
        "correct",
    ),
    (
        "started in a block after",
        fence("def main():\n    a, b = map(int, input().split())\n    print(a + b)")
        + "\nthen call it\n"
        + fence("main()"),
        SUM,
        "correct",
    ),
    (
        "a fence in a docstring",
        fence('def f(x):\n    """Square.\n\n    ```\n    f(2)\n    ```\n    """\n    return x * x'),
        SQUARE,
        "correct",
    ),
    (
        "a fence in a text at the margin",
        fence('NOTE = """\n```\nf(2)\n```\n"""\ndef f(x):\n    return x * x'),
        SQUARE,
        "correct",
    ),
    (
        "a tagged fence in a docstring",
        fence('def f(x):\n    """Square.\n\n```python\nf(2)\n```\n    """\n    return x * x'),
        SQUARE,
        "correct",
    ),
    (
        "a long fence around a short one",
        fence('def f(x):\n    """\n```\n    """\n    return x * x', mark="`````"),
        SQUARE,
        "correct",
    ),
]

MORE_EXTRACTION = [
    (
        "an outline after the program",
        fence(F) + "\nIts shape:\n" + fence("def f(x):\n    ..."),
        SQUARE,
        "correct",
    ),
    (
        "an outline before the program",
        fence('def f(x):\n    """Square."""\n    raise NotImplementedError') + "\n" + fence(F),
        SQUARE,
        "correct",
    ),
    (
        "an outline of the class after it",
        fence(TOTAL) + "\n" + fence("class Solution:\n    def total(self, xs, y):\n        pass"),
        LCB,
        "correct",
    ),
    (
        "one line again after the program",
        fence(F) + "\n" + fence("return x * x"),
        SQUARE,
        "correct",
    ),
    ("an outline alone", fence("def f(x):\n    pass"), SQUARE, ("wrong", "wrong result")),
    (
        "a session after the program",
        f"{fence(F)}\n{fence('>>> f(2)' + chr(10) + '4')}",
        SQUARE,
        "correct",
    ),
    (
        "a session after a script",
        f"{fence('print(5)')}\n{fence('>>> 2 + 3' + chr(10) + '5')}",
        {"tests": [{"input": "", "output": "5"}]},
        "correct",
    ),
    (
        "an example that imports it",
        f"{fence(F)}\n{fence('from solution import f' + chr(10) + 'print(f(2))')}",
        SQUARE,
        "correct",
    ),
    (
        "its own tests after it",
        f"{fence(F)}\n{fence('def test():' + chr(10) + '    assert f(2) == 4')}",
        SQUARE,
        "correct",
    ),
    ("all in a block of Markdown", f"````markdown\n# Answer\n{fence(F)}\n````", SQUARE, "correct"),
    (
        "a block not closed before the next",
        "```python\n" + G + "\nNo:\n" + fence(F),
        SQUARE,
        "correct",
    ),
    (
        "a block cut by the next",
        "```python\n" + F + "\n```bash\npython a.py\n```",
        SQUARE,
        "correct",
    ),
    ("spaces after the marks", "```python  \n" + F + "\n```   \n", SQUARE, "correct"),
    (
        "a class, then its use",
        fence(TOTAL) + "\n" + fence("print(Solution().total([1], 2))"),
        LCB,
        "correct",
    ),
    ("use that would fail", f"{fence(READ)}\n{fence('add(2, 3)')}", SUM, "correct"),
]

SHAPES = [
    ("a list of cases", fence(READ), {"tests": [{"input": "1 2", "output": "3"}]}, "correct"),
    ("JSON text", fence(READ), {"test_cases": json.dumps(SUM["tests"])}, "correct"),
    ("APPS, called", fence(F), {"input_output": json.dumps(SQUARE["tests"])}, "correct"),
    (
        "APPS, results in lists",
        fence(F),
        {"input_output": json.dumps({"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [9]]})},
        "correct",
    ),
    (
        "APPS, results that are lists",
        fence("def f(x): return [x * x]"),
        {"input_output": json.dumps({"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [9]]})},
        "correct",
    ),
    (
        "APPS, now one and now the other",
        fence("def f(x): return [4] if x == 2 else 9"),
        {"input_output": json.dumps({"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [9]]})},
        "wrong",
    ),
    (
        "APPS, lines",
        fence(READ),
        {"input_output": json.dumps({"inputs": [["1 2"]], "outputs": [["3"]]})},
        "correct",
    ),
    (
        "TACO, starter code",
        fence(F),
        {
            "input_output": json.dumps({"inputs": [[2]], "outputs": [4]}),
            "starter_code": "def f(x):\n",
        },
        "correct",
    ),
    ("LiveCodeBench, functional", fence(TOTAL), LCB, "correct"),
    (
        "LiveCodeBench, functional, wrong",
        fence(TOTAL.replace("+ y", "+ 3 * (y > 0) * bool(xs)")),
        LCB,
        ("wrong", "wrong result"),
    ),
    (
        "LiveCodeBench, stdin",
        fence(READ),
        {
            "public_test_cases": json.dumps(
                [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
            ),
            "metadata": "{}",
        },
        "correct",
    ),
    (
        "LiveCodeBench, pickled",
        fence(TOTAL),
        LCB | {"private_test_cases": _pickled([1, 2, 3])},
        ("unknown", "tests cannot be read"),
    ),
    (
        "LiveCodeBench, pickled, wrong in public",
        fence(TOTAL.replace("+ y", "- y")),
        LCB | {"private_test_cases": _pickled([1, 2, 3])},
        ("wrong", "wrong result"),
    ),
    (
        "only pickled",
        fence(READ),
        {"private_test_cases": _pickled([1, 2, 3])},
        ("unknown", "tests cannot be read"),
    ),
    (
        "functional without a name",
        fence(TOTAL),
        {k: v for k, v in LCB.items() if k != "metadata"},
        ("unknown", "the function to test is not named"),
    ),
    (
        "code_contests",
        fence(READ),
        {
            "public_tests": {"input": ["1 2"], "output": ["3"]},
            "generated_tests": {"input": ["4 5"], "output": ["9"]},
        },
        "correct",
    ),
    (
        "code_contests, generated ones fail",
        fence("input(); print(3)"),
        {
            "public_tests": {"input": ["1 2"], "output": ["3"]},
            "generated_tests": {"input": ["4 5"], "output": ["9"]},
        },
        ("wrong", "wrong output"),
    ),
    ("MBPP", fence(F), ASSERTS, "correct"),
    ("MBPP, wrong", fence(G), ASSERTS, ("wrong", "assertion failed")),
    (
        "MBPP, set-up",
        fence("def f(n): return n.value"),
        listed(
            "assert f(Node(3)) == 3",
            test_setup_code="class Node:\n    def __init__(self, v): self.value = v",
        ),
        "correct",
    ),
    (
        "MBPP, challenge fails",
        fence("def f(x): return 4"),
        listed("assert f(2) == 4", challenge_test_list=["assert f(5) == 25"]),
        ("wrong", "assertion failed"),
    ),
    (
        "MBPP, named like a known function",
        fence("def sum(a, b):\n    return a + b"),
        listed("assert sum(10, 15) == 25"),
        "correct",
    ),
    ("HumanEval", fence(F), HUMAN, "correct"),
    ("HumanEval, wrong", fence(G), HUMAN, ("wrong", "assertion failed")),
    (
        "HumanEval, the body alone",
        fence("    return x * x"),
        HUMAN | {"prompt": HUMAN_PROMPT},
        "correct",
    ),
    (
        "HumanEval, imports of the prompt",
        fence("def f(x: int) -> List:\n    return helper(x) * x - x"),
        HUMAN | {"prompt": HUMAN_PROMPT},
        "correct",
    ),
    ("HumanEval, tolerance", fence(F), {"test": NEAR, "entry_point": "f"}, "correct"),
    (
        "HumanEval, tolerance, wrong",
        fence(G),
        {"test": NEAR, "entry_point": "f"},
        ("wrong", "assertion failed"),
    ),
    (
        "HumanEval, loop",
        fence(F),
        {"test": LOOP, "entry_point": "f"},
        ("unknown", "tests inside the sandbox"),
    ),
    (
        "HumanEval, loop, wrong",
        fence(G),
        {"test": LOOP, "entry_point": "f"},
        ("wrong", "assertion failed"),
    ),
]

TRICKS = [
    (
        "helpers of the tests that are not there",
        fence(F),
        listed("from helpers import near\nassert near(f(2), 4)"),
        ("unknown", "tests need a package"),
    ),
    (
        "set-up that needs the program's class",
        fence("class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v"),
        listed("assert f(root) == 3", test_setup_code="root = Node(3)"),
        "correct",
    ),
    (
        "a decision kept in a variable",
        fence("class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()"),
        listed("ok = f(2) == 4\nassert ok"),
        "unknown",
    ),
    (
        "a helper's decision kept in a variable",
        fence(G),
        listed("def good(x): return x == 4", "ok = good(f(2))\nassert ok == True"),
        "unknown",
    ),
    (
        "a helper's decision, wrong",
        fence("def f(x): return 0"),
        listed("def good(x): return x == 4", "ok = good(f(2))\nassert ok == True"),
        "wrong",
    ),
    (
        "the method of a result",
        fence("class T(str):\n    def startswith(self, s): return True\ndef f(x): return T()"),
        listed("r = f(2)\nassert r.startswith('a')"),
        "unknown",
    ),
    ("a sum in a variable", fence(F), listed("r = f(2) + f(3)\nassert r == 13"), "correct"),
    (
        "a flag set in a branch",
        fence(G),
        listed("ok = True\nif f(3) != 9:\n    ok = False\nassert ok"),
        "wrong",
    ),
    (
        "tests that are not Python",
        fence(F),
        listed("assert f(2 == 4"),
        ("unknown", "tests cannot be read"),
    ),
    (
        "test functions",
        fence(F),
        {
            "test": "from solution import f\n\n"
            "def test_two():\n    assert f(2) == 4\n\n"
            "def test_three():\n    x = 3\n    assert f(x) == 9"
        },
        "correct",
    ),
    (
        "test functions, wrong",
        fence(G),
        {
            "test": "from solution import f\n\n"
            "def test_two():\n    assert f(2) == 4\n\ndef test_three():\n    assert f(3) == 9"
        },
        ("wrong", "assertion failed"),
    ),
    (
        "test functions for a test runner",
        fence(F),
        {
            "test": "import pytest\n\n"
            "@pytest.mark.parametrize('x', [1])\ndef test_one(x):\n    assert f(x) == 1"
        },
        "unknown",
    ),
    (
        "an exception is wanted",
        fence("def f(x):\n    if x < 0: raise ValueError\n    return x"),
        listed("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass"),
        "unknown",
    ),
    (
        "two functions in two blocks",
        fence(F) + "\nand\n" + fence("def g(x):\n    return -x"),
        listed("assert f(2) == 4", "assert g(2) == -2"),
        "correct",
    ),
    (
        "input read in one block, used in the next",
        fence("a, b = map(int, input().split())") + "\nthen\n" + fence("print(a + b)"),
        SUM,
        "correct",
    ),
    ("output that is tagged as Python", fence(READ) + "\n" + fence("[1, 2, 3]"), SUM, "correct"),
    (
        "output after a script",
        fence("print(5)") + "\n" + fence("[1, 2, 3]"),
        {"tests": [{"input": "", "output": "5"}]},
        "correct",
    ),
    (
        "missing behind importlib",
        fence("import importlib\nnp = importlib.import_module('numpy')"),
        SUM,
        ("unknown", "package missing in the sandbox"),
    ),
]

NOTHING = [
    ("no tests", fence(READ), {}, ("unknown", "no tests")),
    ("an empty list", fence(READ), {"tests": []}, ("unknown", "no tests")),
    ("empty lists", fence(READ), {"tests": {"inputs": [], "outputs": []}}, ("unknown", "no tests")),
    (
        "no outputs",
        fence(READ),
        {"tests": {"inputs": ["1 2"]}},
        ("unknown", "tests without outputs"),
    ),
    (
        "fewer outputs",
        fence(READ),
        {"tests": {"inputs": ["1 2", "2 2"], "outputs": ["3"]}},
        ("unknown", "tests without outputs"),
    ),
    (
        "more outputs",
        fence(READ),
        {"tests": {"inputs": ["1 2"], "outputs": ["3", "4"]}},
        ("unknown", "tests without outputs"),
    ),
    (
        "a case without output",
        fence(READ),
        {"tests": [{"input": "1 2"}]},
        ("unknown", "tests without outputs"),
    ),
    (
        "a case with null for output",
        fence(READ),
        {"tests": [{"input": "1 2", "output": None}]},
        ("unknown", "tests without outputs"),
    ),
    (
        "empty outputs",
        fence("input()"),
        {"tests": [{"input": "1 2", "output": " \n"}]},
        ("unknown", "tests without outputs"),
    ),
    (
        "unreadable tests",
        fence(READ),
        {"tests": "{'inputs': ["},
        ("unknown", "tests cannot be read"),
    ),
    (
        "arguments that are no list",
        fence(F),
        {"tests": {"fn_name": "f", "inputs": [2], "outputs": [4]}},
        ("unknown", "tests cannot be read"),
    ),
    (
        "a test that is always true",
        fence(G),
        listed("assert (f(2) == 4, 'four')"),
        ("unknown", "a test that is always true"),
    ),
    ("only assert True", fence(G), listed("assert True"), ("unknown", "no tests")),
    ("None is a result", returns("pass"), calling(None), "correct"),
    ("0 is a result", returns("return 0"), calling(0), "correct"),
    ("0 is not None", returns("return 0"), calling(None), "wrong"),
    ("False is not None", returns("return None"), calling(False), "wrong"),
]

VALUES = [
    ("tuples for lists", returns("return (1, (2, 3))"), calling([1, [2, 3]]), "correct"),
    ("floats", returns("return 0.1 + 0.2"), calling(0.3), "correct"),
    ("floats, rounded", returns("return 1 / 3"), calling(0.33333), "correct"),
    ("floats, off", returns("return 0.33334"), calling(0.33333), "wrong"),
    ("floats, tiny", returns("return 1.6e-19"), calling(9.1e-31), "wrong"),
    ("integers, off by one", returns("return 10**15"), calling(10**15 + 1), "wrong"),
    ("an integer as a float, off", returns("return 1e15"), calling(10**15 + 1), "wrong"),
    ("huge integers", returns("return 7**9000"), calling(7**900), "wrong"),
    ("huge integers, equal", returns("return 7**5000"), listed("assert f() == 7**5000"), "correct"),
    ("keys of JSON", returns("return {1: 'a', True: 2}"), calling({"1": 2}), "correct"),
    ("nan", returns("return float('nan')"), calling(1.5), "wrong"),
    ("infinity", returns("return float('inf')"), calling(1e308), "wrong"),
    (
        "Counter",
        returns("import collections\n    return collections.Counter('aab')"),
        calling({"a": 2, "b": 1}),
        "correct",
    ),
    (
        "Counter, asserted",
        "```python\nfrom collections import Counter\ndef f(): return Counter('aab')\n```",
        listed("assert f() == {'a': 2, 'b': 1}"),
        "correct",
    ),
    (
        "Counter of the test",
        "```python\nfrom collections import Counter\ndef f(): return Counter('aab')\n```",
        listed(
            "assert f() == Counter({'a': 2, 'b': 1, 'c': 0})",
            test_imports=["from collections import Counter"],
        ),
        "correct",
    ),
    (
        "Fraction",
        "```python\nfrom fractions import Fraction\ndef f(): return Fraction(2, 4)\n```",
        listed("assert f() == Fraction(1, 2)"),
        "correct",
    ),
    (
        "Fraction, wrong",
        "```python\nfrom fractions import Fraction\ndef f(): return Fraction(2, 5)\n```",
        listed("assert f() == Fraction(1, 2)"),
        "wrong",
    ),
    (
        "Decimal",
        "```python\nfrom decimal import Decimal\ndef f(): return Decimal('1.50')\n```",
        listed("assert f() == Decimal('1.5')"),
        "correct",
    ),
    (
        "namedtuple",
        "```python\nfrom collections import namedtuple\nP = namedtuple('P', 'x y')\n"
        "def f(): return P(1, 2)\n```",
        listed("assert f() == (1, 2)"),
        "correct",
    ),
    (
        "namedtuple for a list",
        "```python\nfrom collections import namedtuple\n"
        "P = namedtuple('P', 'x y')\ndef f(): return [P(1, 2)]\n```",
        calling([[1, 2]]),
        "correct",
    ),
    (
        "deque",
        "```python\nfrom collections import deque\ndef f(): return deque([1, 2])\n```",
        listed("assert f() == deque([1, 2])"),
        "correct",
    ),
    (
        "OrderedDict",
        "```python\nfrom collections import OrderedDict\n"
        "def f(): return OrderedDict(b=1, a=2)\n```",
        listed("assert f() == {'a': 2, 'b': 1}"),
        "correct",
    ),
    (
        "defaultdict",
        "```python\nfrom collections import defaultdict\ndef f():\n"
        "    d = defaultdict(int); d['a'] += 1; return d\n```",
        listed("assert f() == defaultdict(int, {'a': 1})"),
        "correct",
    ),
    ("sets", returns("return {3, 1, 2}"), listed("assert f() == {1, 2, 3}"), "correct"),
    (
        "frozensets in sets",
        returns("return {frozenset({1}), frozenset()}"),
        listed("assert f() == {frozenset([1]), frozenset()}"),
        "correct",
    ),
    (
        "set() of a list",
        returns("return [2, 1, 2]"),
        listed("assert set(f()) == set([1, 2])"),
        "correct",
    ),
    ("complex", returns("return 1 + 2j"), listed("assert f() == complex(1, 2)"), "correct"),
    ("bytes", returns("return b'ab'"), listed("assert f() == b'ab'"), "correct"),
    (
        "a list is no tuple in an assertion",
        returns("return [1]"),
        listed("assert f() == (1,)"),
        "wrong",
    ),
    ("True for 1", returns("return True"), listed("assert f() == 1"), "correct"),
    (
        "a subclass of int",
        "```python\nimport enum\nclass E(enum.IntEnum):\n    A = 3\ndef f(): return E.A\n```",
        listed("assert f() == 3"),
        "correct",
    ),
    (
        "a generator, listed",
        returns("yield from (1, 2)"),
        listed("assert list(f()) == [1, 2]"),
        "correct",
    ),
    ("a map, listed", fence(F), listed("assert list(map(f, [1, 2])) == [1, 4]"), "correct"),
    (
        "calls in a list",
        fence(F),
        listed("assert [f(i) for i in range(3)] == [0, 1, 4]"),
        "correct",
    ),
    ("joined", returns("return 'ab'"), listed("assert '-'.join(f()) == 'a-b'"), "correct"),
    (
        "long results",
        returns("return list(range(30_000))"),
        listed("assert f() == list(range(30_000))"),
        "correct",
    ),
    (
        "long results, wrong at the end",
        returns("return [*range(29_999), 0]"),
        listed("assert f() == list(range(30_000))"),
        "wrong",
    ),
    (
        "long texts",
        returns("return 'x' * 150_000"),
        listed("assert f() == 'x' * 150_000"),
        "correct",
    ),
    (
        "numbers in output",
        fence("print(1.5, 0.1 + 0.2)"),
        {"tests": [{"input": "", "output": "1.50 0.3"}]},
        "correct",
    ),
    (
        "whole numbers in output stay text",
        fence("print('011')"),
        {"tests": [{"input": "", "output": "11"}]},
        "wrong",
    ),
    (
        "nan in output",
        fence("print(float('nan'))"),
        {"tests": [{"input": "", "output": "1.5"}]},
        "wrong",
    ),
    (
        "in place",
        fence("def f(xs):\n    xs.sort()"),
        listed("xs = [3, 1]\nf(xs)\nassert xs == [1, 3]"),
        "correct",
    ),
    (
        "an object of the program",
        fence(
            "class Stack:\n    def __init__(self): self.x = []\n"
            "    def push(self, v): self.x.append(v)\n    def pop(self): return self.x.pop()"
        ),
        listed("s = Stack()\ns.push(4)\nassert s.pop() == 4"),
        "correct",
    ),
    (
        "a truth",
        fence("def f(x):\n    return x > 1"),
        listed("assert f(2)", "assert not f(1)"),
        "correct",
    ),
    ("membership", fence(F), listed("assert f(2) in (3, 4)"), "correct"),
    ("chained", fence(F), listed("assert 3 < f(2) < 5"), "correct"),
    (
        "isclose",
        fence("def f(x):\n    return x / 3"),
        listed("import math\nassert math.isclose(f(1.0), 0.3333, rel_tol=1e-3)"),
        "correct",
    ),
    ("isinstance", fence(F), listed("assert isinstance(f(2), int) and f(2) == 4"), "correct"),
    (
        "a dataclass of the program",
        fence(
            "from dataclasses import dataclass\n@dataclass\nclass P:\n"
            "    x: int\ndef f():\n    return P(1)"
        ),
        listed("assert f() == P(1)"),
        ("unknown", "tests inside the sandbox"),
    ),
]

PACKAGES = [
    (
        "missing, suppressed",
        fence("import contextlib\nwith contextlib.suppress(ImportError):\n    import numpy\n" + G),
        SQUARE,
        ("wrong", "wrong result"),
    ),
    (
        "missing",
        fence("import numpy as np\na, b = map(int, input().split())\nprint(np.add(a, b))"),
        SUM,
        ("unknown", "package missing in the sandbox"),
    ),
    (
        "missing, from",
        fence("from scipy.special import comb\ndef f(x): return x * x"),
        SQUARE,
        ("unknown", "package missing in the sandbox"),
    ),
    (
        "missing in a function",
        fence("def f(x):\n    import pandas\n    return x * x"),
        SQUARE,
        ("unknown", "package missing in the sandbox"),
    ),
    (
        "missing in a function, asserted",
        fence("def f(x):\n    import numpy\n    return x * x"),
        ASSERTS,
        ("unknown", "package missing in the sandbox"),
    ),
    (
        "missing in main()",
        fence("def main():\n    import numpy\nmain()"),
        SUM,
        ("unknown", "package missing in the sandbox"),
    ),
    (
        "missing, raised again",
        fence("try:\n    import numpy\nexcept ImportError:\n    raise"),
        SUM,
        ("unknown", "package missing in the sandbox"),
    ),
    (
        "missing, done without",
        fence("try:\n    import numpy\nexcept ImportError:\n    numpy = None\n" + F),
        SQUARE,
        "correct",
    ),
    (
        "missing, done without, wrong",
        fence("try:\n    import numpy\nexcept ImportError:\n    numpy = None\n" + G),
        SQUARE,
        ("wrong", "wrong result"),
    ),
    ("forged", fence("raise ModuleNotFoundError(\"No module named 'numpy'\")"), SUM, "wrong"),
    (
        "forged beside an import",
        fence(
            "try:\n    import numpy\nexcept ImportError:\n    pass\n"
            "raise ModuleNotFoundError(\"No module named 'numpy'\")"
        ),
        SUM,
        "wrong",
    ),
    (
        "forged in print",
        fence("import sys\nsys.exit(\"ModuleNotFoundError: No module named 'numpy'\")"),
        SUM,
        "wrong",
    ),
    (
        "of the standard library",
        fence("raise ModuleNotFoundError(\"No module named 'math'\")"),
        SUM,
        "wrong",
    ),
    ("invented", fence("import quicksum_helper\nprint(quicksum_helper.go())"), SUM, "wrong"),
    ("removed from the standard library", fence("import imp_that_never_was"), SUM, "wrong"),
    ("its own module", fence("from solution import f"), SQUARE, "wrong"),
    (
        "needed by the tests",
        fence(F),
        listed("import numpy as np\nassert np.allclose(f(2), 4)"),
        ("unknown", "tests need a package"),
    ),
    (
        "needed by the tests' set-up",
        fence(F),
        listed("assert f(2) == 4", test_imports=["import numpy as np"]),
        ("unknown", "tests need a package"),
    ),
]


def forging(text, kind, opened, closed):
    """A program that writes to every open file what its own runner would, with the nonce."""
    line = text.replace("OPEN", f"'[\"{kind}\", {opened}'").replace("CLOSE", f"'{closed}]'")
    return fence(
        "import inspect, os\n"
        "nonce = next(f.frame.f_locals['nonce'] for f in inspect.stack()"
        " if 'nonce' in f.frame.f_locals)\n"
        f"line = (nonce + {line} + '\\n').encode()\n"
        "def f(*a):\n"
        "    for fd in range(1, 20):\n"
        "        try: os.write(fd, line)\n"
        "        except OSError: pass\n"
        "    os._exit(0)"
    )


FORGED = [
    ("open brackets", "'[' * 100_000"),
    ("a value in open brackets", "OPEN + '[' * 100_000"),
    ("closed brackets", "OPEN + '[' * 50_000 + ']' * 50_000 + CLOSE"),
    ("nested lists", "OPEN + '[\"list\", [' * 5_000 + ']]' * 5_000 + CLOSE"),
    ("somewhat nested lists", "OPEN + '[\"list\", [' * 300 + ']]' * 300 + CLOSE"),
    ("a huge number", "OPEN + '9' * 100_000 + CLOSE"),
    ("a huge hexadecimal", "OPEN + '[\"int\", \"' + 'f' * 100_000 + '\"]' + CLOSE"),
    ("a huge decimal", 'OPEN + \'["Decimal", "1e999999999"]\' + CLOSE'),
    ("a huge range", "OPEN + '[\"range\", 0, [\"int\", \"' + 'f' * 40 + '\"], 1]' + CLOSE"),
    ("infinity", 'OPEN + \'["float", "1e999"]\' + CLOSE'),
    ("a bare infinity", "OPEN + '1e999' + CLOSE"),
    ("nan", "OPEN + 'NaN' + CLOSE"),
    ("no such type", 'OPEN + \'["exec", "1"]\' + CLOSE'),
    ("a set of lists", 'OPEN + \'["set", [["list", []]]]\' + CLOSE'),
    ("a fraction of zero", 'OPEN + \'["Fraction", "1", "0"]\' + CLOSE'),
    ("an object for a kind", "OPEN + '[{\"a\": 1}, 2]' + CLOSE"),
    (
        "colliding hashes",
        "OPEN + '[\"set\", [' + ', '.join('[\"int\", \"%x\"]' % (k * (2**61 - 1))"
        " for k in range(1, 4_000)) + ']]' + CLOSE",
    ),
    ("not JSON", "'value'"),
    ("an object", "'{\"value\": 4}'"),
    ("null", "'null'"),
    ("nothing", "''"),
    ("held", "'[\"held\"]'"),
    ("all held", "'[\"held\"]\\n' + nonce + '[\"held\"]'"),
    ("too few values", "'[\"values\", []]'"),
    ("broken", "'[\"broken\", \"ModuleNotFoundError: No module named \\'numpy\\'\", 1]'"),
]

HOSTILE = [
    (f"forged: {name}, {way}", forging(text, *form), tests, "wrong")
    for name, text in FORGED
    for way, form, tests in [
        ("called", ("value", "", ""), SQUARE),
        ("asserted", ("values", "[", "]"), ASSERTS),
    ]
] + [
    (
        "equal to everything",
        fence(
            "class Any:\n    def __eq__(self, other): return True\n"
            "    __hash__ = None\ndef f(x): return Any()"
        ),
        ASSERTS,
        "wrong",
    ),
    (
        "equal to everything, called",
        fence("class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()"),
        SQUARE,
        "wrong",
    ),
    (
        "near everything",
        fence(
            "class Any(float):\n    def __sub__(self, other): return 0.0\n"
            "    __rsub__ = __sub__\ndef f(x): return Any(7)"
        ),
        {"test": NEAR, "entry_point": "f"},
        "wrong",
    ),
    (
        "abs replaced",
        fence("def abs(x): return 0\nimport builtins\nbuiltins.abs = abs\ndef f(x): return 7.0"),
        {"test": NEAR, "entry_point": "f"},
        "wrong",
    ),
    (
        "the helper of the test replaced",
        fence(
            "import builtins\ndef f(x): return -1\n"
            "def f2(*a): return True\nimport sys\nclass M(dict): pass\n"
        ),
        listed("assert good(f(2))", test_setup_code="def good(x): return x == 4"),
        ("wrong", "assertion failed"),
    ),
    (
        "a test inside that was made to hold",
        fence("import builtins\nbuiltins.range = lambda *a: []\ndef f(x): return -1"),
        {"test": LOOP, "entry_point": "f"},
        ("unknown", "tests inside the sandbox"),
    ),
    (
        "a recursive result",
        returns("x = []\n    x.append(x)\n    return x"),
        calling([[]]),
        "wrong",
    ),
    (
        "a deep result",
        returns("x = []\n    for _ in range(100_000): x = [x]\n    return x"),
        calling([[]]),
        "wrong",
    ),
    ("leaving early", fence("import os\nos._exit(0)"), SUM, "wrong"),
    ("leaving early, called", fence("raise SystemExit(0)\n" + F), SQUARE, "wrong"),
    ("printing results", fence("print('4\\n9')\ndef f(x): print(x * x)"), SQUARE, "wrong"),
    (
        "patched json",
        fence("import json\njson.dumps = lambda *a, **k: '[\"value\", 4]'\ndef f(x): return 0"),
        SQUARE,
        "wrong",
    ),
    ("too much output", fence("while True: print('5')"), SUM, ("wrong", "output limit")),
    ("too slow", fence("while True: pass"), SUM, ("wrong", "time limit")),
    (
        "crashing after the answer",
        fence(READ + "\nraise ValueError"),
        SUM,
        ("wrong", "program crashed"),
    ),
    ("syntax", fence("def f(x) return x"), SQUARE, ("wrong", "program crashed")),
]

CASES = [
    (f"{group}: {name}", *rest)
    for group, cases in {
        "extraction": EXTRACTION + MORE_EXTRACTION,
        "shapes": SHAPES,
        "tricks": TRICKS,
        "nothing to go by": NOTHING,
        "values": VALUES,
        "packages": PACKAGES,
        "hostile": HOSTILE,
    }.items()
    for name, *rest in cases
]
