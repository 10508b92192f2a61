"""Takes an assertion apart: what the program must compute, and what is judged outside with it.

``assert abs(f(1.5) - 2.25) < 1e-6`` becomes the hole ``f(1.5)``, which the sandbox fills with a
value, and ``abs(hole - 2.25) < 1e-6``, which is evaluated here by walking its tree: literals,
operators and a list of plain functions. No code of the program or of the test is executed here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.traces.verifiers.code.blocks import dotted
from kd.traces.verifiers.code.plain import CONSTANTS, KEYWORDS, OPERATORS, PLAIN, TYPES
from kd.traces.verifiers.code.values import RAISED


class Inside(Exception):
    """The assertion can only be judged beside the program."""


@dataclass(frozen=True)
class Plan:
    """One assertion taken apart.

    Attributes:
        holes: expressions that the program has to fill.
        test: the assertion over them.
    """

    holes: tuple[str, ...]
    test: ast.expr

    def holds(self, values: list[Any]) -> bool:
        """Whether the assertion holds with its holes so filled.

        Raises:
            Exception: as the assertion itself would, with values that do not fit it.
        """
        return bool(_value(self.test, values))


def plan(
    test: ast.expr,
    *,
    own: Collection[str] = (),
    tested: Collection[str] = (),
    data: Collection[str] = (),
    objects: Collection[str] = (),
    constants: Mapping[str, ast.expr] | None = None,
) -> Plan:
    """Take an assertion apart.

    Args:
        test: what is asserted.
        own: names that the test defines: the program could falsify what they compute.
        tested: functions under test whose names are also plain ones (a task may ask for ``sum``).
        data: variables that the test assigned and the program was given, or gave.
        objects: those of them that are objects of the program's classes.
        constants: variables that the program never gets hold of, with their values.

    Raises:
        Inside: it cannot be taken apart so that the program could not decide its verdict.
    """
    if isinstance(test, (ast.Tuple, ast.List, ast.Dict, ast.Constant)):
        raise Inside  # always true, or never
    planner = _Planner(set(own), set(tested), set(data), set(objects), constants or {})
    try:
        planned = planner.planned(test)
    except RecursionError:
        raise Inside from None
    if not planner.holes:
        raise Inside  # it says nothing about the program
    return Plan(tuple(planner.holes), planned)


class _Planner:
    def __init__(
        self,
        own: set[str],
        tested: set[str],
        data: set[str],
        objects: set[str],
        constants: Mapping[str, ast.expr],
    ) -> None:
        self.own, self.tested, self.data, self.objects = own, tested, data, objects
        self.constants = constants
        self.holes: list[str] = []

    def planned(self, node: ast.expr) -> ast.expr:
        """The node with holes for what the program computes."""
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.BoolOp):
            return ast.BoolOp(node.op, [self.planned(part) for part in node.values])
        if isinstance(node, (ast.List, ast.Tuple)):
            return type(node)([self.planned(part) for part in node.elts], node.ctx)
        if isinstance(node, ast.Set):
            return ast.Set([self.planned(part) for part in node.elts])
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return ast.UnaryOp(node.op, self.planned(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return ast.BinOp(self.planned(node.left), node.op, self.planned(node.right))
        if isinstance(node, ast.Dict) and None not in node.keys:
            keys = [self.planned(key) for key in node.keys if key is not None]
            return ast.Dict(list(keys), [self.planned(value) for value in node.values])
        if isinstance(node, ast.Subscript) and _is_constant_index(node.slice):
            return ast.Subscript(self.planned(node.value), node.slice, node.ctx)
        if isinstance(node, ast.Constant) or dotted(node) in CONSTANTS:
            return node
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id]
        if isinstance(node, ast.Call) and self._is_plain(node):
            return self._call(node)
        if not self._fillable(node):
            raise Inside
        self.holes.append(ast.unparse(node))
        return ast.Name(f"hole {len(self.holes) - 1}", ast.Load())

    def _compared(self, node: ast.Compare) -> ast.expr:
        """At most one side may come from the program, or it would also say what is wanted."""
        sides: list[ast.expr] = []
        filled = 0
        for side in [node.left, *node.comparators]:
            before = len(self.holes)
            made = self.planned(side)
            if len(self.holes) > before:
                filled += 1
            else:
                made = _folded(made)
            sides.append(made)
        if filled > 1:
            raise Inside
        return ast.Compare(sides[0], node.ops, sides[1:])

    def _is_plain(self, node: ast.Call) -> bool:
        name = dotted(node.func)
        if name == "isinstance":
            return len(node.args) == 2 and _types(node.args[1]) is not None and not node.keywords
        return name in PLAIN and name not in self.tested and name not in self.own

    def _call(self, node: ast.Call) -> ast.expr:
        name = dotted(node.func)
        starred = any(isinstance(arg, ast.Starred) for arg in node.args)
        if starred or any(keyword.arg not in KEYWORDS for keyword in node.keywords):
            raise Inside
        arguments = list(node.args)
        typed = {"isinstance": slice(1, 2), "defaultdict": slice(0, 1)}.get(name.split(".")[-1])
        types = arguments[typed] if typed else []
        if typed and types and _types(types[0]) is not None:
            made = [arg if arg is types[0] else self.planned(arg) for arg in arguments]
        else:
            made = [self.planned(arg) for arg in arguments]
        keywords = [ast.keyword(k.arg, self.planned(k.value)) for k in node.keywords]
        return ast.Call(node.func, made, keywords)

    def _fillable(self, node: ast.expr) -> bool:
        """Whether its value is the program's to choose: a call of one of its functions, a method
        of one of its objects, a variable that it was given, or a row of such calls."""
        if isinstance(node, ast.Name):
            return node.id in self.data
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            return isinstance(node.elt, ast.Call) and self._fillable(node.elt)
        if isinstance(node, ast.Attribute):
            return isinstance(node.value, ast.Name) and node.value.id in self.objects
        if not isinstance(node, ast.Call) or any(map(_is_verdict, ast.walk(node))):
            return False
        called = node.func
        if isinstance(called, ast.Name):
            return called.id not in self.own and called.id not in self.data
        if not isinstance(called, ast.Attribute):
            return False
        made = called.value
        if isinstance(made, ast.Call):  # Solution().f(1); the method of a result would decide
            maker = dotted(made.func)
            return maker[:1].isupper() and maker not in self.own
        if isinstance(made, ast.Constant):
            return called.attr == "join"
        return isinstance(made, ast.Name) and made.id in self.objects


def _is_verdict(node: ast.AST) -> bool:
    """Whether it makes a truth value of others, which the program could foresee."""
    name = dotted(node.func) if isinstance(node, ast.Call) else ""
    return name in ("all", "any", "isinstance", "isclose", "math.isclose")


def decides(node: ast.expr, own: Collection[str]) -> bool:
    """Whether a value holds a decision of the test's: a comparison, or what its own names make."""
    deciding = (ast.Compare, ast.BoolOp, ast.IfExp, ast.Lambda, ast.Not)
    return any(
        isinstance(part, deciding)
        or _is_verdict(part)
        or (isinstance(part, ast.Name) and part.id in own)
        for part in ast.walk(node)
    )


def constant(node: ast.expr) -> ast.expr | None:
    """The value of an expression that needs no program; None for any other."""
    planner = _Planner(set(), set(), set(), set(), {})
    try:
        planned = planner.planned(node)
        return None if planner.holes else _folded(planned)
    except (Inside, RecursionError):
        return None


def handed_over(statements: Iterable[ast.stmt]) -> set[str]:
    """Variables that some statements use in anything but a comparison of their own."""
    found: set[str] = set()
    for item in statements:
        if isinstance(item, ast.Assert):
            calls = [n for n in ast.walk(item.test) if isinstance(n, ast.Call)]
            inside: list[ast.AST] = [n for n in calls if dotted(n.func) not in PLAIN]
        else:
            inside = [item]
        for part in inside:
            loads = (n for n in ast.walk(part) if isinstance(n, ast.Name))
            found |= {n.id for n in loads if isinstance(n.ctx, ast.Load)}
    return found


def _folded(node: ast.expr) -> ast.expr:
    try:
        return ast.Constant(_value(node, []))
    except RAISED:  # the test itself is broken
        raise Inside from None


def _value(node: ast.AST, holes: list[Any]) -> Any:
    """The value of a planned expression."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id.startswith("hole "):
        return holes[int(node.id[5:])]
    if isinstance(node, ast.Compare):
        left = _value(node.left, holes)
        for op, side in zip(node.ops, node.comparators, strict=True):
            right = _value(side, holes)
            if not OPERATORS[type(op)](left, right):
                return False
            left = right
        return True
    if isinstance(node, ast.BoolOp):
        parts: Any = (_value(part, holes) for part in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        return OPERATORS[type(node.op)](_value(node.operand, holes))
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_value(node.left, holes), _value(node.right, holes))
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kinds: dict[type, Callable[..., Any]] = {ast.List: list, ast.Tuple: tuple, ast.Set: set}
        return kinds[type(node)]([_value(part, holes) for part in node.elts])
    if isinstance(node, ast.Dict):
        keys = [_value(key, holes) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(value, holes) for value in node.values), strict=True))
    if isinstance(node, ast.Subscript):
        return _value(node.value, holes)[ast.literal_eval(node.slice)]
    name = dotted(node)
    if name in CONSTANTS:
        return CONSTANTS[name]
    assert isinstance(node, ast.Call)
    if dotted(node.func) == "isinstance":
        return isinstance(_value(node.args[0], holes), _types(node.args[1]) or ())
    arguments = [_argument(arg, holes) for arg in node.args]
    keywords = {str(k.arg): _value(k.value, holes) for k in node.keywords}
    return PLAIN[dotted(node.func)](*arguments, **keywords)


def _argument(node: ast.expr, holes: list[Any]) -> Any:
    """As ``_value``; the type that a defaultdict is made with has no value here."""
    return None if isinstance(node, ast.Name) and node.id in TYPES else _value(node, holes)


def called(tree: ast.AST, own: Collection[str]) -> set[str]:
    """The functions that some tests call by name, their own left out."""
    calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {name for name in calls if name.isidentifier() and name not in own}


def _types(node: ast.expr) -> tuple[type, ...] | None:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    found = [TYPES.get(dotted(part)) for part in parts]
    return None if None in found else tuple(t for t in found if t is not None)


def _is_constant_index(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True
