"""Tests written as ``assert`` statements: MBPP's lists, HumanEval's ``check(candidate)``.

What an assertion wants stays outside the sandbox wherever it can be taken apart (expressions.py).
Any other has to run beside the program it tests, and a program bent on it could make it hold: the
verdict is unknown then, unless such tests are trusted.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd.traces.verifiers.code.blocks import defined, dotted, parsed
from kd.traces.verifiers.code.expressions import (
    Inside,
    Plan,
    called,
    constant,
    decides,
    handed_over,
    plan,
)
from kd.traces.verifiers.code.plain import CONSTANTS, PLAIN

LONGEST = 400_000  # characters of tests that are parsed
# as what tests import the program that they test
PROGRAMS = {"solution", "solutions", "candidate", "submission", "program", "answer", "main"}
PROGRAMS |= {"your_module", "my_module", "__main__"}


class Refused(ValueError):
    """Tests that cannot decide anything.

    Attributes:
        reason: a short fixed phrase.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Step:
    """One statement of the tests.

    Attributes:
        source: the statement.
        plan: how it is judged outside the sandbox; None: it is run inside.
        judges: whether it is a test, not a preparation of one.
    """

    source: str
    plan: Plan | None = None
    judges: bool = True

    @property
    def inside(self) -> bool:
        """Whether it is a test that has to be judged beside the program."""
        return self.judges and self.plan is None


@dataclass(frozen=True)
class Asserts:
    """The statements of a record's tests.

    Attributes:
        steps: in their order.
        setup: what runs before the program.
        name: the function that the tests call ``candidate``; "" where they use its own name.
        names: the functions and classes that they use.
    """

    steps: tuple[Step, ...]
    setup: str = ""
    name: str = ""
    names: frozenset[str] = frozenset()
    reads = False  # programs are called, not fed

    def __len__(self) -> int:
        return len(self.tests)

    @property
    def sources(self) -> str:
        """What of the tests runs in the sandbox by itself."""
        return "\n".join([self.setup, *(step.source for step in self.steps if not step.plan)])

    @property
    def tests(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.judges)

    def first(self, most: int | None) -> Asserts:
        """The same with so many tests at most."""
        left, kept = len(self.tests) if most is None else most, []
        for step in self.steps:
            if left == 0:
                break
            kept.append(step)
            left -= step.judges
        return replace(self, steps=tuple(kept))


def read_asserts(metadata: Mapping[str, Any]) -> Asserts | None:
    """The assertions of a record: ``test_list`` (with ``challenge_test_list``), ``tests`` or
    ``test`` as statements or functions named ``test_...``, with ``test_setup_code`` and
    ``test_imports``; or ``test`` with a ``check`` function and the ``entry_point`` that it is
    given; None where there are none.

    Raises:
        Refused: an assertion is always true, or the tests are not Python.
    """
    setup = "\n".join(
        [*_lines(metadata.get("test_imports")), *_lines(metadata.get("test_setup_code"))]
    )
    text, name = metadata.get("test"), str(metadata.get("entry_point") or "")
    if isinstance(text, str) and "def check(" in text and name.isidentifier():
        return _checked(text, setup, name)
    for key in ("test_list", "tests", "test"):
        listed = metadata.get(key)
        if isinstance(listed, str) and not listed.lstrip().startswith(("[", "{")):
            listed = [listed]
        if isinstance(listed, Sequence) and not isinstance(listed, str):
            texts = [text for text in listed if isinstance(text, str)]
            if len(texts) == len(listed) and any("assert" in text for text in texts):
                more = metadata.get("challenge_test_list") if key == "test_list" else None
                return _listed([*texts, *_lines(more)], setup)
    return None


def _tree(text: str) -> ast.Module:
    tree = parsed(text) if len(text) <= LONGEST else None
    if tree is None:
        raise Refused("tests cannot be read", f"not Python: {text[:120]}")
    return tree


def _lines(value: Any) -> list[str]:
    return [str(line) for line in value] if isinstance(value, list) else [str(value or "")]


def _listed(texts: list[str], setup: str) -> Asserts:
    trees = [_tree(text) for text in texts]
    reader = _Reader(ast.Module([item for tree in trees for item in tree.body], []), setup)
    steps = [step for tree in trees for step in reader.steps(tree.body)]
    return Asserts(tuple(steps), setup, "", frozenset(reader.names))


def _checked(text: str, setup: str, name: str) -> Asserts:
    """HumanEval's form: the statements of ``check``, when they can stand alone."""
    names = frozenset({name})
    whole = Asserts((Step(f"{text}\ncheck(candidate)"),), setup, name, names)
    tree = _tree(text)
    found = [i for i in tree.body if isinstance(i, ast.FunctionDef) and i.name == "check"]
    if len(found) != 1 or [arg.arg for arg in found[0].args.args] != ["candidate"]:
        return whole
    check = found[0]
    if not _stand_alone(check.body):
        return whole
    rest = [item for item in tree.body if item is not check and not _calls_check(item)]
    setup = "\n".join([setup, *map(ast.unparse, rest)]).strip()
    reader = _Reader(ast.Module(check.body, []), setup)
    return Asserts(tuple(reader.steps(check.body)), setup, name, names)


def _stand_alone(body: list[ast.stmt]) -> bool:
    """Whether the statements of a function mean the same outside it."""
    bound = (ast.Return, ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)
    return not any(isinstance(node, bound) for item in body for node in ast.walk(item))


def _calls_check(item: ast.stmt) -> bool:
    call = item.value if isinstance(item, ast.Expr) else None
    return isinstance(call, ast.Call) and dotted(call.func) == "check"


class _Reader:
    """Turns statements into steps; it knows which names belong to the tests themselves."""

    def __init__(self, tests: ast.Module, setup: str) -> None:
        before = parsed(setup)
        self.own = _functions(tests) | (_functions(before) if before else set())
        self.data: set[str] = set()
        self.objects: set[str] = set()
        self.constants: dict[str, ast.expr] = {}
        self.handed_over = handed_over(_flat(tests.body))
        known = set(dir(builtins)) | set(PLAIN) | set(CONSTANTS)
        self.names = called(tests, self.own) - known
        self.tested: set[str] = set()
        if not self.names:  # the function asked for has the name of a known one
            self.tested = {n for item in tests.body for n in _outermost(item)} - self.own
            self.names = self.tested

    def steps(self, statements: Iterable[ast.stmt]) -> list[Step]:
        """The statements as steps, in order."""
        made = []
        for item in statements:
            source = ast.unparse(item)
            if isinstance(item, ast.Assert):
                made += self._assertion(item, source)
            elif isinstance(item, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                self._assigned(item)
                made.append(Step(source, judges=False))
            elif isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
                made += self._function(item, source)
            elif isinstance(item, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                if not _of_the_program(item):
                    made.append(Step(source, judges=False))
            elif isinstance(item, ast.Expr):
                judges = bool(called(item, ()) & self.own)
                made.append(Step(source, judges=judges))
            elif not isinstance(item, ast.Pass):
                self._forget(item)
                made.append(Step(source))
        return made

    def _function(self, item: ast.FunctionDef, source: str) -> list[Step]:
        """A test function's statements, or a call of it where they need it around them."""
        if item.args.args or item.decorator_list:
            return [Step(source, judges=False)]  # for a test runner alone
        if _stand_alone(item.body):
            return self.steps(item.body)
        return [Step(f"{source}\n{item.name}()")]

    def _assigned(self, item: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        """A variable that was given to the program, or that it gave, may be asked for; not one in
        which the test has decided something."""
        self._forget(item)
        value = item.value
        if value is None or isinstance(item, ast.AugAssign) or decides(value, self.own):
            return
        names = defined(ast.Module([item], []))
        self.data |= names
        if isinstance(value, ast.Call) and dotted(value.func)[:1].isupper():
            self.objects |= names
        known = constant(value)
        targets = item.targets if isinstance(item, ast.Assign) else [item.target]
        if known is not None and all(isinstance(target, ast.Name) for target in targets):
            self.constants |= {name: known for name in names - self.handed_over}

    def _forget(self, item: ast.stmt) -> None:
        """What a statement binds is not what it was."""
        stores = (n for n in ast.walk(item) if isinstance(n, ast.Name))
        names = {n.id for n in stores if isinstance(n.ctx, ast.Store)}
        self.data -= names
        self.objects -= names
        for name in names & set(self.constants):
            del self.constants[name]

    def _assertion(self, item: ast.Assert, source: str) -> list[Step]:
        if isinstance(item.test, ast.Constant) and item.test.value:
            return []  # "assert True" only says that the line was reached
        if isinstance(item.test, ast.Tuple) and item.test.elts:
            raise Refused("a test that is always true", source[:120])
        try:
            made = plan(
                item.test,
                own=self.own,
                tested=self.tested,
                data=self.data,
                objects=self.objects,
                constants=self.constants,
            )
        except Inside:
            return [Step(source)]
        return [Step(source, made)]


def _flat(statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    """The statements, those of test functions among them."""
    found: list[ast.stmt] = []
    for item in statements:
        if isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
            found += item.body if _stand_alone(item.body) else [item]
        else:
            found.append(item)
    return found


def _functions(tree: ast.Module) -> set[str]:
    """Functions, classes and modules that some statements bring; what has a plain meaning here
    (``from collections import Counter``) counts as that."""
    found: set[str] = set()
    for item in ast.walk(tree):
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(item.name)
        elif isinstance(item, ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and not _of_the_program(item):
            for alias in item.names:
                if not alias.asname and f"{item.module}.{alias.name}" in PLAIN:
                    continue
                found.add(alias.asname or alias.name)
    return found


def _of_the_program(item: ast.AST) -> bool:
    """Whether it imports what it tests."""
    named = isinstance(item, ast.ImportFrom) and item.module in PROGRAMS
    return named and not any(alias.asname or alias.name == "*" for alias in item.names)  # type: ignore[attr-defined]


def _outermost(item: ast.stmt) -> set[str]:
    """The first function that a statement calls."""
    for node in ast.walk(item):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return {node.func.id}
    return set()
