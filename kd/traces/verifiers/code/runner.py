"""Runs in the sandbox beside the program it tests: a script that imports nothing of kd.

It reads one JSON line {"nonce", "setup", "program", "name", "steps"}, and answers each step in one
line: the nonce, then JSON. What the program prints goes to stderr. Steps are

    ["call", [arguments]]     call the function "name", or the method of that name of "Solution"
    ["values", [expressions]] evaluate each
    ["run", statements]       run them; they must not raise

and answers ["value", code], ["values", [codes]], ["held"], ["raised", what, line], or, before any
step, ["broken", what, line] where setup or program cannot be run. Values are written by ``encode``
and read by values.py. Nothing that is wanted of the program is known here.
"""

import collections
import collections.abc
import datetime
import decimal
import fractions
import itertools
import json
import numbers
import os
import sys
import types

EXACT = 2**53
MOST = 10_000  # items taken of an iterator


def encode(value):
    """A value as JSON: what JSON has is written as it is, anything else as [type, ...]."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if isinstance(value, str):
        return str.__getitem__(value, slice(None))
    if isinstance(value, numbers.Integral):
        plain = int(value)
        return plain if -EXACT < plain < EXACT else ["int", format(plain, "x")]
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    for base, write in WRITERS:
        if isinstance(value, base):
            return [base.__name__, *write(value)]
    if isinstance(value, collections.abc.Iterator):
        return ["iterator", [encode(item) for item in itertools.islice(value, MOST)]]
    return ["object", kind.__name__[:80], repr(value)[:200]]


def items(value):
    return [[encode(item) for item in value]]


def pairs(value):
    return [[[encode(key), encode(value[key])] for key in value]]


# a subclass comes before its base
WRITERS = (
    (list, items),
    (tuple, items),
    (set, items),
    (frozenset, items),
    (collections.deque, items),
    (collections.Counter, pairs),
    (collections.OrderedDict, pairs),
    (dict, pairs),
    (complex, lambda v: [float.__repr__(v.real), float.__repr__(v.imag)]),
    (bytes, lambda v: [v.hex()]),
    (bytearray, lambda v: [v.hex()]),
    (range, lambda v: [encode(v.start), encode(v.stop), encode(v.step)]),
    (fractions.Fraction, lambda v: [format(v.numerator, "x"), format(v.denominator, "x")]),
    (decimal.Decimal, lambda v: [str(v)]),
    (datetime.datetime, lambda v: [v.isoformat()]),
    (datetime.date, lambda v: [v.isoformat()]),
    (datetime.time, lambda v: [v.isoformat()]),
    (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds]),
)


def line_of(error):
    """The last line of the program that an exception came through; 0 for none."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "candidate.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def said(kind, error):
    return [kind, f"{type(error).__name__}: {error}"[:200], line_of(error)]


def function(space, name):
    """What is called: a fresh ``Solution`` for every call, as its authors expect."""
    if name in space:
        return space[name]
    return getattr(space["Solution"](), name)


def prepared(setup, space):
    """Run what the tests prepare; some of it needs the program, and is run again after it."""
    try:
        exec(compile(setup, "setup.py", "exec"), space)
        return True
    except Exception:
        return False


def step(space, name, kind, what):
    if kind == "call":
        return ["value", encode(function(space, name)(*what))]
    if kind == "values":
        return ["values", [encode(eval(compile(text, "test.py", "eval"), space)) for text in what]]
    exec(compile(what, "test.py", "exec"), space)
    return ["held"]


def main():
    answers = os.fdopen(os.dup(1), "w")
    request = json.loads(sys.stdin.readline())
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    nonce = request["nonce"]
    write, flush, dumps = answers.write, answers.flush, json.dumps

    def answer(content):
        write(nonce + dumps(content) + "\n")
        flush()

    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    space = module.__dict__
    try:
        ready = prepared(request["setup"], space)
        exec(compile(request["program"], "candidate.py", "exec"), space)
        if not ready:
            exec(compile(request["setup"], "setup.py", "exec"), space)
        if request["steps"][0][0] != "call" and request["name"]:
            space["candidate"] = function(space, request["name"])
    except BaseException as error:
        answer(said("broken", error))
        return
    for kind, what in request["steps"]:
        try:
            content = step(space, request["name"], kind, what)
        except BaseException as error:
            content = said("raised", error)
        answer(content)


if __name__ == "__main__":
    main()
