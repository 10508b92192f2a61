r"""A strict reader of algebra in LaTeX or plain text: everything is read, or ``Unreadable`` raised.

Readers that skip what they do not know call ``4\sqrt(2)`` four and ``12_8`` twelve. Here a text
that has a second reading (``1/2x``, ``2 3``) or an unknown sign has none.

The tree: ``("num", Fraction)``, ``("sym", name)``, ``("const", "pi" | "e" | "i" | "inf")``, and
``(operation, argument, ...)`` with add, mul, div, pow, neg, fact, binom, abs, floor, ceil, root,
log (base, argument) and the functions by name.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from kd.traces.verifiers.maths.tokens import FUNCTIONS, Token, Unreadable, tokens_of

LONGEST = 2_000  # characters
_OPENING = {
    "lfloor": ("floor", "rfloor"), "lceil": ("ceil", "rceil"), "lvert": ("abs", "rvert"),
}  # fmt: skip
_CLOSING = {close for _, close in _OPENING.values()}
DEEPEST = 60  # brackets and powers in one another
Node = tuple[Any, ...]

GREEK = set(
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi "
    "psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega".split()
)
_MARKED = {"overline", "bar", "vec", "hat", "tilde", "mathbb", "mathcal", "overrightarrow"}
_APPLIED = set("fghFGHPE")  # f(x) is a function; x(x+1) is a product


def parse(text: str) -> Node:
    """Read an expression in the spelling of ``plain``.

    Raises:
        Unreadable: a part of it is unknown or has two meanings, or it is too long.
    """
    if len(text) > LONGEST:
        raise Unreadable("too long")
    reader = _Reader(tokens_of(text))
    node = reader.sum()
    if reader.at < len(reader.tokens):
        raise Unreadable(f"{reader.tokens[reader.at][1]!r} was not expected")
    return node


class _Reader:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = self.bars = 0

    def peek(self, ahead: int = 0) -> Token:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ("end", "")

    def take(self, sign: str) -> bool:
        if self.peek() == ("sign", sign):
            self.at += 1
            return True
        return False

    def need(self, sign: str) -> None:
        if not self.take(sign):
            raise Unreadable(f"{sign!r} is missing")

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("nested too deeply")
        node: Node | None = None
        while True:
            if self.take("+"):
                minus = False
            elif self.take("-"):
                minus = True
            elif node is None:
                minus = False
            else:
                break
            term = self.product()
            term = ("neg", term) if minus else term
            node = term if node is None else ("add", node, term)
        self.depth -= 1
        return node

    def product(self) -> Node:
        node, divided = self.factor(), False
        while True:
            kind, sign = self.peek()
            if kind == "sign" and sign in "*/":
                self.at += 1
                right = self.signed()
                node, divided = ("div" if sign == "/" else "mul", node, right), sign == "/"
            elif (kind == "command" and sign in _CLOSING) or kind == "end":
                return node
            elif kind in ("number", "letter", "command") or sign in ("(", "{"):
                if divided:
                    raise Unreadable("a product behind a slash has two readings")
                node = self.beside(node)
            elif sign == "|" and self.opens_bar():
                node = ("mul", node, self.factor())
            else:
                return node

    def opens_bar(self) -> bool:
        """Whether the bar ahead begins an absolute value: we are in none."""
        return not self.bars

    def signed(self) -> Node:
        if self.take("-"):
            return ("neg", self.factor())
        self.take("+")
        return self.factor()

    def beside(self, node: Node) -> Node:
        """Two factors beside each other: a mixed number, or a product."""
        whole = self.at and self.tokens[self.at - 1][0] == "number" and node[0] == "num"
        if self.peek()[0] == "number" and not whole and self.tokens[self.at - 1][1] != "!":
            raise Unreadable("a number behind a letter or a bracket")
        right = self.factor()
        if right[0] == "num" and whole and self.peek() == ("sign", "/"):
            self.at += 1
            right = ("div", right, self.factor())
        if right[0] == "num" or (whole and _begins_with_number(right)):
            raise Unreadable("two numbers beside each other")
        if whole and right[0] == "div" and right[1][0] == right[2][0] == "num":
            over, under, units = right[1][1], right[2][1], node[1]
            if not (units.denominator == 1 and 0 < over < under):
                raise Unreadable("a number beside a fraction has two readings")
            return ("num", units + over / under)
        return ("mul", node, right)

    def factor(self) -> Node:
        node = self.base()
        while True:
            if self.take("!"):
                node = ("fact", node)
            elif self.take("%"):
                node = ("div", node, ("num", Fraction(100)))
            elif self.peek() == ("command", "deg"):
                self.at += 1
                node = ("div", ("mul", node, ("const", "pi")), ("num", Fraction(180)))
            elif self.take("^"):
                node = ("pow", node, self.exponent())
                if self.peek() == ("sign", "^"):
                    raise Unreadable("a tower of powers without brackets")
            else:
                return node

    def exponent(self) -> Node:
        if self.take("{"):
            node = self.sum()
            self.need("}")
            return node
        if self.take("-"):
            return ("neg", self.base())
        return self.base()

    def group(self, close: str) -> Node:
        node = self.sum()
        self.need(close)
        return node

    def base(self) -> Node:
        kind, text = self.peek()
        self.at += 1
        if kind == "number":
            return self.number(text)
        if kind == "letter":
            return self.symbol(text)
        if kind == "command":
            return self.command(text)
        if text == "(":
            return self.group(")")
        if text == "{":
            return self.group("}")
        if text == "|":
            self.bars += 1
            node = self.group("|")
            self.bars -= 1
            return ("abs", node)
        raise Unreadable(f"{text!r} was not expected" if text else "it ends too early")

    def number(self, text: str) -> Node:
        value = Fraction(text)
        if self.peek() == ("sign", "_"):
            raise Unreadable("a number with an index")
        return ("num", value)

    def symbol(self, name: str) -> Node:
        marks = ""
        while True:
            if self.take("'"):
                marks += "'"
            elif self.take("_"):
                marks += "_" + self.index()
            else:
                break
        if not marks and name in ("e", "i"):
            return ("const", name)
        if self.peek() == ("sign", "("):
            if name == "C" and not marks:
                return self.choose()
            if name in _APPLIED or marks.endswith("'"):
                return ("sym", f"{name}{marks}({self.raw()})")
        return ("sym", name + marks)

    def index(self) -> str:
        kind, text = self.peek()
        if (kind, text) == ("sign", "{"):
            return self.raw()
        self.at += 1
        if kind not in ("letter", "number", "command"):
            raise Unreadable("an index is missing")
        return text

    def raw(self) -> str:
        """The tokens of a bracket, as they stand."""
        opened, depth, begin = self.peek()[1], 0, self.at + 1
        close = {"(": ")", "{": "}"}[opened]
        while self.at < len(self.tokens):
            text = self.peek()[1]
            self.at += 1
            depth += (text == opened) - (text == close)
            if depth == 0:
                return "".join(token for _, token in self.tokens[begin : self.at - 1])
        raise Unreadable(f"{close!r} is missing")

    def choose(self) -> Node:
        """C(n, k), as far as it has two arguments."""
        self.need("(")
        over = self.sum()
        if self.take(")"):
            return ("mul", ("sym", "C"), over)
        self.need(",")
        under = self.group(")")
        return ("binom", over, under)

    def command(self, name: str) -> Node:
        if name in ("pi", "infty"):
            return ("const", "pi" if name == "pi" else "inf")
        if name == "frac":
            return self.fraction()
        if name == "binom":
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in _OPENING:
            operation, close = _OPENING[name]
            bars, self.bars = self.bars, 0
            node, self.bars = self.sum(), bars
            if self.peek() != ("command", close):
                raise Unreadable(f"\\{close} is missing")
            self.at += 1
            return (operation, node)
        if name in FUNCTIONS:
            return self.function(name)
        if name in GREEK:
            return self.symbol("\\" + name)
        if name in _MARKED and self.peek() == ("sign", "{"):
            return self.symbol(f"\\{name}{{{self.raw()}}}")
        raise Unreadable(f"\\{name} is not known")

    def fraction(self) -> Node:
        kind, text = self.peek()
        if kind == "number":
            if len(text) == 2 and text.isdigit():  # \frac12
                self.at += 1
                return ("div", ("num", Fraction(int(text[0]))), ("num", Fraction(int(text[1]))))
            if len(text) > 2:
                raise Unreadable("a fraction without braces")
        return ("div", self.argument(), self.argument())

    def argument(self) -> Node:
        if self.take("{"):
            return self.group("}")
        kind, text = self.peek()
        if kind == "number" and len(text) > 1 and self.tokens[self.at - 1][1] != "sqrt":
            raise Unreadable("an argument without braces")
        if kind in ("number", "letter", "command"):
            return self.base()
        if text == "(":
            return self.base()
        raise Unreadable("an argument is missing")

    def root(self) -> Node:
        degree: Node = ("num", Fraction(2))
        if self.take("["):
            degree = self.sum()
            self.need("]")
            if self.peek()[0] == "number":  # the cube root of 16, not of 1
                return ("root", degree, self.base())
        return ("root", degree, self.argument())

    def function(self, name: str) -> Node:
        power: Node | None = None
        lower: Node | None = None
        while True:
            if self.take("^"):
                power = self.exponent()
            elif self.take("_") and name == "log":
                lower = self.argument_of_index()
            else:
                break
        bracket = self.peek()[1] in ("(", "{", "|")
        node = self.base() if bracket else self.loose_argument()
        if not bracket and self.peek() in (("sign", "/"), ("sign", "(")):
            raise Unreadable("a slash or a bracket behind an argument without brackets")
        if power == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("a" + name, node)
        if name == "log":
            made: Node = ("log", lower or ("const", "base"), node)
        else:
            made = (name, node)
        return made if power is None else ("pow", made, power)

    def argument_of_index(self) -> Node:
        if self.take("{"):
            return self.group("}")
        return self.base()

    def loose_argument(self) -> Node:
        """The factors behind a function without brackets, up to a sign or the next function."""
        node = self.factor()
        while True:
            kind, text = self.peek()
            function = kind == "command" and text in FUNCTIONS
            if kind == "number":
                raise Unreadable("a number behind a letter or a bracket")
            if kind in ("letter", "command") and not function:
                node = ("mul", node, self.factor())
            else:
                return node


def _begins_with_number(node: Node) -> bool:
    """Whether a factor is a number's power or factorial: 3 2^5 has two numbers in a row."""
    return node[0] in ("pow", "fact") and node[1][0] == "num"


def symbols(node: Node) -> set[str]:
    """The names of a tree's unknowns."""
    if node[0] == "sym":
        return {node[1]}
    found: set[str] = set()
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= symbols(part)
    return found


def has(node: Node, what: Node) -> bool:
    """Whether a tree holds a node."""
    return node == what or any(has(part, what) for part in node[1:] if isinstance(part, tuple))
