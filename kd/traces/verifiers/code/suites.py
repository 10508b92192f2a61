"""Reads the tests of a record, in the shapes that data sets have them, into one form.

| shape | columns |
|---|---|
| APPS, TACO | ``input_output``: JSON text {inputs, outputs[, fn_name]} |
| LiveCodeBench | ``public_test_cases``, ``private_test_cases``: JSON text [{input, output, testtype}]; the function's name in ``metadata`` or ``starter_code`` |
| code_contests | ``public_tests``, ``private_tests``, ``generated_tests``: {input: [...], output: [...]} |
| lists | ``tests``, ``test_cases``, ``official_tests``: [{input, output}], or {inputs, outputs[, fn_name]} |
| MBPP | ``test_list``, ``test_setup_code``, ``test_imports``, ``challenge_test_list`` |
| HumanEval | ``test``, ``entry_point`` |

A test without a wanted result, or tests that cannot be read, are refused by name.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kd.traces.verifiers.code.asserts import Asserts, Refused, read_asserts

COLUMNS = (
    *("tests", "test_cases", "input_output", "official_tests", "verification_info"),
    *("public_test_cases", "private_test_cases"),
    *("public_tests", "private_tests", "generated_tests"),
)
NAMES = ("fn_name", "func_name", "function_name", "entry_point")


@dataclass(frozen=True)
class Cases:
    """Inputs with the outputs that are wanted.

    Attributes:
        cases: (stdin, stdout) as text, or with a name (arguments, result).
        name: the function that is called; "" for a program that reads and prints.
        unread: tests that are there and could not be read, in words.
    """

    cases: tuple[tuple[Any, Any], ...]
    name: str = ""
    unread: tuple[str, ...] = ()
    sources = ""  # of the tests themselves: they have none

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def names(self) -> frozenset[str]:
        """The function that the program must define."""
        return frozenset({self.name} if self.name else ())

    @property
    def reads(self) -> bool:
        """Whether the program is given something to read."""
        return not self.name and any(given.strip() for given, _ in self.cases)

    def first(self, most: int | None) -> Cases:
        """The same with so many tests at most."""
        return replace(self, cases=self.cases[:most])


def read_tests(metadata: Mapping[str, Any]) -> Cases | Asserts | None:
    """The tests of a record; None where there are none.

    Raises:
        Refused: there are tests that cannot decide anything.
    """
    try:
        asserted = read_asserts(metadata)
    except RecursionError:
        raise Refused("tests cannot be read", "they are nested too deeply") from None
    if asserted is not None:
        return asserted
    found: list[tuple[Any, Any, bool]] = []
    unread: list[str] = []
    name = _named(metadata)
    for column in COLUMNS:
        content = metadata.get(column)
        if content is None or (hasattr(content, "__len__") and not len(content)):
            continue
        try:
            content = _unpacked(content, column)
        except Refused as error:
            unread.append(f"{error.detail}")
            continue
        for part in content if isinstance(content, list) else [content]:
            name = (_named(part) if isinstance(part, Mapping) else "") or name
        found += _rows(content, column, name)
    if not found and unread:
        raise Refused("tests cannot be read", "; ".join(unread))
    if not found:
        return None
    functional = {kind for _, _, kind in found}
    if functional == {True} and not name:
        raise Refused("the function to test is not named", "no fn_name, func_name or starter code")
    if len(functional) > 1:
        raise Refused("tests of two kinds", "stdin and functions in one record")
    if functional == {False}:
        name = ""
    make = _call if name else _text_pair
    cases = tuple(make(given, wanted, n) for n, (given, wanted, _) in enumerate(found))
    if not name and not any(wanted.strip() for _, wanted in cases):
        raise Refused("tests without outputs", f"{len(cases)} tests, every output is empty")
    return Cases(cases, name, tuple(unread))


def _named(record: Mapping[str, Any]) -> str:
    """The function that is tested, from wherever a record says it."""
    more = record.get("metadata")
    if isinstance(more, str):
        try:
            more = json.loads(more)
        except (ValueError, RecursionError):
            more = None
    for place in (record, more if isinstance(more, Mapping) else {}):
        for key in NAMES:
            if isinstance(place.get(key), str) and place[key].strip():
                return str(place[key]).strip()
    starter = record.get("starter_code")
    found = (
        re.findall(r"^[ \t]*def[ \t]+(\w+)[ \t]*\(", starter, re.M)
        if isinstance(starter, str)
        else []
    )
    return found[-1] if found else ""


def _unpacked(content: Any, column: str) -> Any:
    """JSON text as what it stands for; never anything that would have to be unpickled."""
    if isinstance(content, (bytes, bytearray)):
        raise Refused("", f"{column} is binary (pickled?); decode it to JSON where you trust it")
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            packed = re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", content) and len(content) > 16
            told = "a compressed pickle, which is never opened; decode it where you trust it"
            raise Refused("", f"{column} is {told if packed else 'not JSON'}") from None
    if isinstance(content, Mapping) and "test_cases" in content:
        return _unpacked(content["test_cases"], column)
    return content


def _rows(content: Any, column: str, name: str) -> list[tuple[Any, Any, bool]]:
    """(given, wanted, whether a function is called) of every test in a column."""
    if isinstance(content, Mapping):
        for many in (("inputs", "outputs"), ("input", "output")):
            if many[0] in content:
                return _zipped(content, many, column, name)
        raise Refused("tests cannot be read", f"{column} has keys {', '.join(map(str, content))}")
    if not isinstance(content, list) or not all(isinstance(test, Mapping) for test in content):
        raise Refused("tests cannot be read", f"{column} is {type(content).__name__}")
    rows = []
    for number, test in enumerate(content):
        if "input" not in test or "output" not in test:
            lost = "input" if "input" not in test else "output"
            raise Refused("tests without outputs", f"{column}: test {number} has no {lost}")
        kind = str(test.get("testtype") or test.get("type") or "stdin")
        functional = kind in ("functional", "function_call") or bool(_named(test))
        rows.append((test["input"], test["output"], functional))
    return rows


def _zipped(
    content: Mapping[str, Any], keys: tuple[str, str], column: str, name: str
) -> list[tuple[Any, Any, bool]]:
    inputs, outputs = content[keys[0]], content.get(keys[1])
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        what = f"{column}: {keys[0]} and {keys[1]} must be lists"
        raise Refused("tests without outputs", f"{what}, got {type(outputs).__name__}")
    if len(inputs) != len(outputs):
        counted = f"{column}: {len(inputs)} inputs and {len(outputs)} outputs"
        raise Refused("tests without outputs", counted)
    # a name that stands beside the tests may mean nothing where they are texts
    functional = bool(_named(content)) or (name != "" and all(isinstance(i, list) for i in inputs))
    if functional and inputs and all(isinstance(o, list) and len(o) == 1 for o in outputs):
        outputs = [Wrapped(output) for output in outputs]
    return [(i, o, functional) for i, o in zip(inputs, outputs, strict=True)]


class Wrapped(list[Any]):
    """A result that every test of a record writes as a list of one item. APPS means the item, and
    others the list: a program has to agree with one reading throughout."""


def _text_pair(given: Any, wanted: Any, number: int) -> tuple[str, str]:
    if wanted is None:
        raise Refused("tests without outputs", f"test {number} has no output")
    return _as_text(given, number), _as_text(wanted, number)


def _as_text(value: Any, number: int) -> str:
    if isinstance(value, list) and not any(isinstance(part, (list, Mapping)) for part in value):
        return "\n".join(map(str, value))
    if isinstance(value, (list, Mapping)):
        raise Refused("tests cannot be read", f"test {number}: {type(value).__name__} for a text")
    return "" if value is None else str(value)


def _call(given: Any, wanted: Any, number: int) -> tuple[list[Any], Any]:
    """Arguments and result; as text they are JSON, an argument a line (LiveCodeBench)."""
    if isinstance(given, str):
        try:
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        except (ValueError, RecursionError) as error:
            raise Refused("tests cannot be read", f"test {number}: {error}") from None
    if not isinstance(given, list):
        kind = type(given).__name__
        raise Refused(
            "tests cannot be read", f"test {number}: arguments must be a list, got {kind}"
        )
    return given, wanted
