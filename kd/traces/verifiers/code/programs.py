"""Finds the program in an answer by structure: what its blocks define, read and need.

An answer may hold helpers before the program, an example of its use after it, earlier attempts,
output, or no fences at all. The program is the last block that defines what the tests call, or
else reads the input, with what it needs from the blocks around it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kd.traces.verifiers.code.blocks import PYTHON, Block, fenced, plain

LONGEST = 200_000  # characters of an answer's end that are looked at
_OTHERS = set(
    "c c++ cpp cxx c# cs csharp java javascript js jsx typescript ts tsx go golang rust rs ruby rb "
    "kotlin kt swift php scala haskell hs perl pl r julia jl lua dart ocaml pascal fortran".split()
)


@dataclass(frozen=True)
class Found:
    """What came of looking for a program.

    Attributes:
        program: its source; None where there is none.
        reason: why there is none.
        foreign: the language it is written in, where that is not Python.
    """

    program: str | None
    reason: str = ""
    foreign: str = ""


def find_program(answer: str, names: Collection[str] = (), *, reads: bool = False) -> Found:
    """The program in an answer.

    Args:
        answer: the text.
        names: functions or classes that the tests call; the last block that defines one counts.
        reads: whether the tests give it input; a block that reads is then preferred.

    Returns:
        The program, or why there is none: "no code in the answer", "unterminated code fence" (the
        last block never ends and does not parse), or "not a Python program".
    """
    text = answer[-LONGEST:].replace("\r\n", "\n").replace("\r", "\n")
    found = [(language, block) for language, block in fenced(text) if not block.is_transcript]
    blocks = _candidates(found, set(names))
    if not found:
        blocks = [block for block in [plain(text)] if block]
    if not blocks:
        foreign = next((language for language, _ in found[::-1] if language in _OTHERS), "")
        if foreign:
            return Found(None, "not a Python program", foreign)
        cut = any(not block.closed for _, block in found)
        return Found(None, "unterminated code fence" if cut else "no code in the answer")
    chosen = _chosen(blocks, set(names), reads)
    if not chosen.closed and chosen.tree is None:
        return Found(None, "unterminated code fence")
    return Found(_with_what_it_needs(blocks, chosen, set(names)))


def _candidates(found: list[tuple[str, Block]], names: set[str]) -> list[Block]:
    """The blocks of Python; those without a language too, where the others are not enough."""
    tagged = [block for language, block in found if language in PYTHON]
    tagged = [block for block in tagged if block.is_code or block.tree is None] or tagged
    if tagged and (not names or any(block.makes & names for block in tagged)):
        return tagged
    bare = [block for language, block in found if not language and block.is_code]
    return [block for _, block in found if block in tagged or block in bare]


def _chosen(blocks: list[Block], names: set[str], reads: bool) -> Block:
    if names:
        fitting = [block for block in blocks if block.makes & names]
    else:
        fitting = [block for block in blocks if block.reads] if reads else []
        alone = [block for block in blocks if block.tree and block.acts and not block.missing]
        fitting = fitting or alone
    return (fitting or blocks)[-1]


def _with_what_it_needs(blocks: list[Block], chosen: Block, names: set[str]) -> str:
    """The program, after the definitions that it lacks, and before the line that starts it."""
    at = blocks.index(chosen)
    parts, taken = {at: chosen.source}, {at}
    needed = chosen.missing | (names - chosen.makes)
    while needed:
        have = [i for i, b in enumerate(blocks) if i not in taken and b.tree and b.defines & needed]
        if not have:
            break
        nearest = max((i for i in have if i < at), default=have[0])
        taken.add(nearest)
        source = blocks[nearest].definitions(needed)
        # what comes after the program goes before it: it only defines
        parts[nearest if nearest < at else nearest - len(blocks)] = source
        needed = (needed - blocks[nearest].defines) | Block(source).missing
    if not names and not chosen.acts:
        for block in blocks[at + 1 :]:
            if block.acts and block.tree and block.missing and block.missing <= chosen.defines:
                parts[len(blocks)] = block.source
                break
    return "\n\n".join(parts[i] for i in sorted(parts))
