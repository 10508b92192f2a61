"""LaTeX that sympy writes is read as what sympy means: random terms, rewritten and changed."""

import random
from fractions import Fraction

import pytest
import sympy

from kd.traces import Trace, verifier
from kd.traces.verifiers.maths.evaluating import value
from kd.traces.verifiers.maths.expressions import parse
from kd.traces.verifiers.maths.plain import plain

X, Y, N = sympy.symbols("x y n", positive=True)
ONE = (
    sympy.sqrt, sympy.sin, sympy.cos, sympy.tan, sympy.exp, sympy.atan, sympy.sinh, sympy.log,
    sympy.Abs, sympy.floor, lambda a: -a, lambda a: sympy.E ** (-a), lambda a: a**2,
    lambda a: 1 / a, lambda a: sympy.factorial(N) + a, lambda a: sympy.binomial(N + 3, 2) * a,
)  # fmt: skip
TWO = (
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b,
    lambda a, b: sympy.sqrt(a) * b, lambda a, b: sympy.Abs(a - b), lambda a, b: a**3 + b,
)  # fmt: skip


def term(rng, depth):
    if not depth or rng.random() < 0.15:
        whole = sympy.Integer(rng.randint(1, 12))
        part = sympy.Rational(rng.randint(1, 9), rng.randint(2, 9))
        return rng.choice(
            [X, Y, N, whole, part, sympy.pi, sympy.E, sympy.Float(rng.randint(1, 99)) / 8]
        )
    if rng.random() < 0.5:
        return rng.choice(ONE)(term(rng, depth - 1))
    return rng.choice(TWO)(term(rng, depth - 1), term(rng, depth - 1))


def terms(seed, count):
    rng = random.Random(seed)
    while count:
        made = term(rng, rng.randint(1, 3))
        if not made.has(sympy.zoo, sympy.nan, sympy.oo, sympy.I):
            count -= 1
            yield rng, made


def latex(rng, made):
    return sympy.latex(
        made,
        ln_notation=True,  # log without a base has two meanings
        mul_symbol=rng.choice([None, "dot", "times"]),
        fold_short_frac=False,
        inv_trig_style=rng.choice(["abbreviated", "full", "power"]),
    )


def test_latex_of_random_terms_has_sympys_value():
    read = 0
    for rng, made in terms(seed=1, count=400):
        text = latex(rng, made)
        point = {"x": Fraction(rng.randint(3, 30), 7), "y": Fraction(rng.randint(2, 40), 9)}
        point["n"] = Fraction(rng.randint(1, 6))
        try:
            ours = value(parse(plain(text)), point)
        except ValueError:  # no logarithm, too large, ...
            continue
        exact = {s: sympy.Rational(f.numerator, f.denominator) for s, f in
                 zip((X, Y, N), (point[name] for name in "xyn"), strict=True)}  # fmt: skip
        theirs = complex(sympy.N(made.subs(exact), 30))
        found = complex(float(ours) if isinstance(ours, Fraction) else ours)
        assert found == pytest.approx(theirs, rel=1e-9, abs=1e-9), text
        read += 1
    assert read > 380


def test_terms_rewritten_are_never_wrong_and_changed_never_correct():
    judge, decided = verifier("maths"), 0
    for rng, drawn in terms(seed=2, count=150):
        made = sympy.nsimplify(drawn, rational=True)  # factors of decimals are rounded
        reference = latex(rng, made)
        if made == 0:
            continue  # whatever it is multiplied by
        for other, right in (
            (sympy.expand(made), True),
            (sympy.factor(made), True),
            (made + sympy.Rational(1, 7), False),
            (made * sympy.Rational(8, 7), False),
            (-made, False),
        ):
            if other.has(sympy.Integral, sympy.zoo, sympy.nan):
                continue
            answer = rf"So the result is \boxed{{{latex(rng, other)}}}."
            found = judge(Trace("q", "t", answer, reference=reference))
            assert found.status == "unknown" or found.correct == right, (reference, answer, found)
            decided += found.status != "unknown"
    assert decided > 600
