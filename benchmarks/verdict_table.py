"""How the verifiers judge answers labelled by hand: the table in the README of kd/traces.

    python benchmarks/verdict_table.py            # print it
    python benchmarks/verdict_table.py --write    # put it between the README's two markers
    python benchmarks/verdict_table.py --peers    # beside math-verify alone, on the same pairs
    python benchmarks/verdict_table.py --show     # every pair that was not decided as labelled

The pairs are tests/verdict_pairs.txt, those held out tests/verdict_held_out.txt.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kd.traces import Trace, Verdict, verifier
from kd_bench import tables

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "tests" / "verdict_pairs.txt"
HELD_OUT = ROOT / "tests" / "verdict_held_out.txt"
README = ROOT / "kd" / "traces" / "README.md"
BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"
COLUMNS = ("verifier", "pairs", "decided", "as labelled", "false correct", "false wrong", "unknown")


class Pair(NamedTuple):
    """An answer, the reference it is judged by, and what a careful grader says."""

    verifier: str
    reference: str
    answer: str
    right: bool

    def trace(self) -> Trace:
        return Trace("q", "t", self.answer, reference=self.reference)


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file: lines that begin with "@ ", "= ", "+ " or "- "; ⏎ is a line break."""
    name = reference = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        sign, text = line[:2], line[2:].replace("⏎", "\n")
        if sign == "@ ":
            name = text
        elif sign == "= ":
            reference = text
        elif sign in ("+ ", "- "):
            yield Pair(name, reference, text, sign == "+ ")
        else:
            raise ValueError(f"{path}:{number}: a line must begin with @, =, + or -, got {line!r}.")


def outcome(pair: Pair, verdict: Verdict) -> str:
    """What a verdict is worth: "right", "false correct", "false wrong" or "unknown"."""
    if verdict.status not in ("correct", "wrong"):
        return "unknown"
    if verdict.correct == pair.right:
        return "right"
    return "false correct" if verdict.correct else "false wrong"


def count(path: Path, judges: dict[str, Callable[[Trace], Verdict]]) -> dict[str, Counter[str]]:
    """Outcomes by verifier."""
    found = {name: Counter[str]() for name in judges}
    for pair in read_pairs(path):
        if pair.verifier in judges:
            found[pair.verifier][outcome(pair, judges[pair.verifier](pair.trace()))] += 1
    return found


def ours() -> dict[str, Callable[[Trace], Verdict]]:
    return {name: verifier(name) for name in ("maths", "numeric", "choice", "exact")}


def rows(counts: dict[str, Counter[str]]) -> list[list[str]]:
    found = []
    for name, of in counts.items():
        if pairs := of.total():
            decided = f"{100 * (pairs - of['unknown']) / pairs:.1f} %"
            numbers = [of[said] for said in ("right", "false correct", "false wrong", "unknown")]
            found.append([name, pairs, decided, *numbers])
    return found


def markdown(counts: dict[str, Counter[str]]) -> str:
    return tables.markdown(COLUMNS, rows(counts), text=COLUMNS)


def table() -> str:
    """The table as Markdown; its last line is the pairs that nothing was fitted to."""
    every, apart = count(PAIRS, ours()), count(HELD_OUT, ours())
    sums = {name: sum(of.values(), Counter()) for name, of in (("all", every), ("held out", apart))}
    return markdown(every | sums)


def math_verify() -> Callable[[Trace], Verdict]:
    """math-verify as its own README calls it: gold and answer parsed, then compared.

    It reads LaTeX between dollars only, so that bare LaTeX is put there.
    """
    from math_verify import parse, verify

    def parsed(text: str) -> list[object]:
        bare = "\\" in text and not any(mark in text for mark in ("$", "\\(", "\\[", "box"))
        return (parse(f"${text}$") if bare else parse(text)) or parse(f"${text}$")

    def judge(trace: Trace) -> Verdict:
        gold, answer = parsed(trace.reference), parsed(trace.answer)
        if not gold or not answer:
            return Verdict("unknown", "nothing parsed")
        return Verdict("correct" if verify(gold, answer) else "wrong")

    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--peers", action="store_true", help="judge with math-verify too")
    parser.add_argument("--show", action="store_true", help="print the pairs that are not decided")
    args = parser.parse_args()
    if args.show:
        judges = ours()
        for pair in read_pairs(PAIRS):
            verdict = judges[pair.verifier](pair.trace())
            said = outcome(pair, verdict)
            if said != "right":
                print(f"{said}: {pair} {verdict.reason} {verdict.detail}")
    if args.peers:
        peer = math_verify()
        found = count(PAIRS, {"maths": peer, "numeric": peer})
        print(markdown({f"math-verify on {name}": one for name, one in found.items()}))
    started = time.perf_counter()
    made = table()
    print(made, f"\n{time.perf_counter() - started:.1f} s")
    if args.write:
        text = README.read_text(encoding="utf-8")
        text = tables.put_between(README, text, BEGIN, END, made)
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
