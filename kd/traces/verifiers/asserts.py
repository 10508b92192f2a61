"""Tests written as ``assert`` statements (MBPP's lists, HumanEval's ``check(candidate)``).

The wanted side of ``assert f(1) == [2]`` is compared outside the sandbox and never enters it. Any
other assertion has to run beside the program it tests, which a program bent on it could deceive:
the verdict's ``extra["asserted_inside"]`` counts those.
"""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 200_000  # characters of tests that are parsed
LONGEST_VALUE = 100_000  # characters of a result's repr
MISSING = object()

RUNNER = """
import io, json, sys
_request = json.loads(sys.stdin.readline())
sys.stdin = io.StringIO("")
_answers = sys.stdout
sys.stdout = sys.stderr
_space = {"__name__": "candidate"}
exec(compile(_request["setup"], "setup.py", "exec"), _space)
exec(compile(_request["program"], "candidate.py", "exec"), _space)
if _request["name"]:
    _space["candidate"] = _space[_request["name"]]
for _kind, _text in _request["steps"]:
    try:
        if _kind == "value":
            _said = ["value", repr(eval(compile(_text, "test.py", "eval"), _space))[:LONGEST]]
        else:
            exec(compile(_text, "test.py", "exec"), _space)
            _said = ["held", ""]
    except BaseException as _error:
        _said = ["raised", f"{type(_error).__name__}: {_error}"[:200]]
    _answers.write(_request["nonce"] + json.dumps(_said) + "\\n")
    _answers.flush()
""".replace("LONGEST", str(LONGEST_VALUE))


@dataclass(frozen=True)
class Assertion:
    """One test: an expression with the value it must have, or a statement that must not raise."""

    source: str
    wanted: Any = MISSING

    @property
    def inside(self) -> bool:
        """Whether it has to be judged in the sandbox."""
        return self.wanted is MISSING


@dataclass(frozen=True)
class Asserts:
    """The assertions of a record, what runs before the program, and the function ``candidate``."""

    tests: tuple[Assertion, ...]
    setup: str = ""
    name: str = ""

    def request(self, program: str) -> tuple[str, str]:
        """What RUNNER reads, and the nonce that its answers begin with."""
        nonce = secrets.token_hex(16)
        steps = [("run" if test.inside else "value", test.source) for test in self.tests]
        request = {"program": program, "setup": self.setup, "name": self.name, "steps": steps}
        return json.dumps({**request, "nonce": nonce}) + "\n", nonce


def read_asserts(metadata: Mapping[str, Any]) -> Asserts | None:
    """The assertions of a record: ``test_list`` or ``tests`` as a list of statements (with
    ``test_setup_code`` and ``test_imports``), or ``test`` with a ``check`` function and the
    ``entry_point`` that it is given; None where there are none.
    """
    setup = "\n".join(
        [*_lines(metadata.get("test_imports")), *_lines(metadata.get("test_setup_code"))]
    )
    for key in ("test_list", "tests"):
        listed = metadata.get(key)
        if isinstance(listed, str) and listed.lstrip().startswith("assert"):
            listed = [listed]
        if isinstance(listed, list) and listed and all(isinstance(t, str) for t in listed):
            tests = [test for text in listed for test in assertions(text)]
            return Asserts(tuple(tests), setup) if tests else None
    text, name = metadata.get("test"), str(metadata.get("entry_point") or "")
    if isinstance(text, str) and "def check(" in text and name.isidentifier():
        return _checked(text, setup, name)
    return None


def _lines(value: Any) -> list[str]:
    return value if isinstance(value, list) else [str(value)] if value else []


def _checked(text: str, setup: str, name: str) -> Asserts:
    """HumanEval's form: the assertions of ``check``, taken apart when it holds nothing else."""
    whole = Asserts((Assertion(f"{text}\ncheck(candidate)"),), setup, name)
    try:
        statements = ast.parse(text[:LONGEST]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return whole
    found = [item for item in statements if isinstance(item, ast.FunctionDef)]
    if len(found) != 1 or found[0].name != "check":
        return whole
    body = found[0].body
    if not body or not all(isinstance(item, ast.Assert) for item in body):
        return whole
    before = "\n".join(ast.unparse(item) for item in statements if item is not found[0])
    tests = tuple(_assertion(item) for item in body if isinstance(item, ast.Assert))
    return Asserts(tests, f"{setup}\n{before}".strip(), name)


def assertions(text: str) -> list[Assertion]:
    """The tests in some statements; anything but ``assert ... == literal`` is run as it is."""
    try:
        statements = ast.parse(text[:LONGEST]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [Assertion(text)]
    if not all(isinstance(item, ast.Assert) for item in statements):
        return [Assertion(text)]
    return [_assertion(item) for item in statements if isinstance(item, ast.Assert)]


def _assertion(statement: ast.Assert) -> Assertion:
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, operator, right = test.left, test.ops[0], test.comparators[0]
        if isinstance(operator, (ast.Eq, ast.Is)):
            for asked, wanted in ((left, right), (right, left)):
                value = literal(ast.unparse(wanted))
                if value is not MISSING and literal(ast.unparse(asked)) is MISSING:
                    return Assertion(ast.unparse(asked), value)
    return Assertion(ast.unparse(statement))


def literal(text: str) -> Any:
    """The value of a Python literal, MISSING for anything else; ``set()`` counts as one."""
    if text.strip() in ("set()", "frozenset()"):
        return set()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return MISSING


def same(found: str, wanted: Any) -> bool:
    """Whether a result's repr stands for the wanted value."""
    try:
        return bool(literal(found) == wanted)
    except (RecursionError, TypeError):
        return False
