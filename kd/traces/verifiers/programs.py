"""Finds the program in an answer by structure: what its blocks define, read and need.

An answer may hold helpers before the program, an example of its use after it, earlier attempts,
output, or no fences at all. The program is the last block that defines what the tests call, or
else reads the input, with what it needs from the blocks around it.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass

LONGEST = 400_000  # characters of an answer's end that are looked at
CLOSERS = 8  # lines tried as the end of a block
_OPEN = re.compile(
    r"^(?P<before>[ \t]*(?:>[ \t]?)*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})"
    r"[ \t]*(?P<info>[^`\n]*)$"
)
_PYTHON = {"python", "py", "ipython"}
_OTHERS = set(
    "c c++ cpp cxx c# cs csharp java javascript js jsx typescript ts tsx go golang rust rs ruby rb "
    "kotlin kt swift php scala haskell hs perl pl r julia jl lua dart ocaml pascal fortran".split()
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_OUTPUT = (  # what printed text may parse as
    *(ast.Constant, ast.Name, ast.List, ast.Tuple, ast.Dict, ast.Set),
    *(ast.UnaryOp, ast.BinOp, ast.Compare, ast.Subscript, ast.Attribute),
)
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\(\s*0\b|\bfileinput\b|/dev/stdin")
_STARTS = re.compile(
    r"^(?:def |class |import |from \w+(?:\.\w+)* import |async def |@\w|[\w, ]+ = )"
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


class _Block:
    """One piece of code: its source, and what it defines, reads and does."""

    def __init__(self, source: str, closed: bool = True) -> None:
        self.source, self.closed = source, closed
        self.tree = parsed(source)

    @property
    def defines(self) -> set[str]:
        if self.tree is None:
            return set(re.findall(r"^\s*(?:async\s+)?(?:def|class)\s+(\w+)", self.source, re.M))
        return defined(self.tree)

    @property
    def makes(self) -> set[str]:
        """What it defines by itself; an example of use may import the same name."""
        if self.tree is None:
            return self.defines
        own = [item for item in self.tree.body if not isinstance(item, _IMPORTS)]
        return defined(ast.Module(own, []))

    @property
    def reads(self) -> bool:
        return _READS.search(self.source) is not None

    @property
    def acts(self) -> bool:
        """Whether it does more than define."""
        if self.tree is None:
            return True
        passive = (*_DEFINITIONS, *_IMPORTS, *_ASSIGNMENTS)
        return any(not isinstance(item, passive) and not _text(item) for item in self.tree.body)

    @property
    def is_transcript(self) -> bool:
        return self.source.lstrip().startswith((">>>", "In ["))

    @property
    def is_code(self) -> bool:
        """Whether it is Python rather than output or prose that happens to parse."""
        if self.tree is None:
            return False
        return any(
            not (isinstance(item, ast.Expr) and isinstance(item.value, _OUTPUT))
            and not (isinstance(item, ast.AnnAssign) and item.value is None)
            for item in self.tree.body
        )

    def missing(self) -> set[str]:
        """Names that it uses and neither defines nor has from Python."""
        if self.tree is None:
            return set()
        used, bound = _names(self.tree)
        return set() if "*" in bound else used - bound - set(dir(builtins))

    def definitions(self) -> str:
        """Its source without what it does."""
        assert self.tree is not None
        lines = self.source.splitlines()
        kept = (*_DEFINITIONS, *_IMPORTS, *_ASSIGNMENTS)
        parts = []
        for item in self.tree.body:
            if isinstance(item, kept):
                above = [line.lineno for line in getattr(item, "decorator_list", [])]
                part = lines[min([item.lineno, *above]) - 1 : item.end_lineno]
                if not isinstance(item, _ASSIGNMENTS) or not _READS.search("\n".join(part)):
                    parts += part
        return "\n".join(parts)


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
    fenced = [(language, block) for language, block in _fenced(text) if not block.is_transcript]
    blocks = [block for language, block in fenced if language in _PYTHON]
    blocks = blocks or [block for language, block in fenced if not language and block.is_code]
    if names and not any(block.makes & set(names) for block in blocks):
        more = [b for language, b in fenced if not language and b.is_code and b not in blocks]
        blocks = [b for _, b in fenced if b in blocks or b in more]
    if not blocks and not fenced:
        plain = _plain(text)
        blocks = [plain] if plain else []
    if not blocks:
        foreign = next((language for language, _ in fenced[::-1] if language in _OTHERS), "")
        if foreign:
            return Found(None, "not a Python program", foreign)
        cut = any(not block.closed for _, block in fenced)
        return Found(None, "unterminated code fence" if cut else "no code in the answer")
    chosen = _chosen(blocks, set(names), reads)
    if not chosen.closed and chosen.tree is None:
        return Found(None, "unterminated code fence")
    return Found(_with_what_it_needs(blocks, chosen, bool(names)))


def _chosen(blocks: list[_Block], names: set[str], reads: bool) -> _Block:
    by_rank = [lambda block: bool(block.makes & names)] if names else []
    if reads and not names:
        by_rank += [lambda block: block.reads]
    if not names:
        by_rank += [lambda block: block.tree is not None and block.acts and not block.missing()]
    for fits in by_rank:
        found = [block for block in blocks if fits(block)]
        if found:
            return found[-1]
    return blocks[-1]


def _with_what_it_needs(blocks: list[_Block], chosen: _Block, called: bool) -> str:
    """The program, after the definitions that it lacks, and before the line that starts it."""
    at = blocks.index(chosen)
    parts, needed, taken = [chosen.source], chosen.missing(), {at}
    while needed:
        have = [i for i, b in enumerate(blocks) if i not in taken and b.tree and b.defines & needed]
        if not have:
            break
        nearest = max((i for i in have if i < at), default=have[0])
        taken.add(nearest)
        needed = (needed - blocks[nearest].defines) | _still_missing(blocks[nearest])
        parts.insert(0, blocks[nearest].definitions())
    if not called and not chosen.acts:
        for block in blocks[at + 1 :]:
            if block.acts and block.tree and block.missing() and block.missing() <= chosen.defines:
                parts.append(block.source)
                break
    return "\n\n".join(parts)


def _still_missing(block: _Block) -> set[str]:
    return _Block(block.definitions()).missing()


def _fenced(text: str) -> list[tuple[str, _Block]]:
    """Every fenced block with its language, in order."""
    lines, found, at = text.split("\n"), [], 0
    while at < len(lines):
        opened = _OPEN.match(lines[at])
        if opened is None:
            at += 1
            continue
        language = _language(opened["info"])
        block, at = _read_block(lines, at, opened, language in _PYTHON or not language)
        if language in ("md", "markdown"):  # an answer that was put into a block as a whole
            found += _fenced(block.source)
        else:
            found.append((language, block))
    return found


def _read_block(
    lines: list[str], at: int, opened: re.Match[str], is_python: bool
) -> tuple[_Block, int]:
    """The block and the line after it. A fence in a docstring also looks like the end, so the
    first end is taken before which the code parses; the first of all where none does."""
    fence = re.escape(opened["fence"][0])
    close = re.compile(rf"^[ \t>]*{fence}{{{len(opened['fence'])},}}[ \t]*$")
    ends = [i for i in range(at + 1, len(lines)) if close.match(lines[i])][:CLOSERS]
    # the next block begins where this one was never closed
    begun = [i for i in range(at + 1, len(lines)) if _begins(lines[i], opened["fence"])][:1]
    blocks = []
    for end in ends + begun if is_python else ends[:1]:
        block = _Block(_inner(lines[at + 1 : end], opened["before"]))
        after = end if end in begun else end + 1
        if block.tree is not None:
            return block, after
        blocks.append((block, after))
    if blocks:
        return min(blocks, key=lambda each: each[1])
    return _Block(_inner(lines[at + 1 :], opened["before"]), closed=False), len(lines)


def _begins(line: str, fence: str) -> bool:
    opened = _OPEN.match(line)
    return opened is not None and opened["fence"] == fence and bool(opened["info"].strip())


def _inner(lines: list[str], before: str) -> str:
    """The code of a block in a list or a quotation, without what stands before each line."""
    if ">" in before:
        lines = [re.sub(r"^[ \t]*(?:>[ \t]?)+", "", line) for line in lines]
    return textwrap.dedent("\n".join(lines)) + "\n"


def _language(info: str) -> str:
    word = re.match(r"[{.\s]*([\w+#-]*)", info.strip())
    name = word[1].lower() if word else ""
    return "python" if name.rstrip("0123456789") in _PYTHON else name


def _plain(text: str) -> _Block | None:
    """The code of an answer without fences: the longest run of lines that parses, from a line
    that starts like code."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if _STARTS.match(line)][:5]
    for start in [0, *starts]:
        for end in range(len(lines), max(start, len(lines) - 40), -1):
            block = _Block("\n".join(lines[start:end]) + "\n")
            if block.tree is not None:
                if block.is_code:
                    return block
                break
    return None


def parsed(source: str) -> ast.Module | None:
    """The syntax tree; None where it is not Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def defined(tree: ast.Module) -> set[str]:
    """Names that exist after a module has run, and the methods of its class ``Solution``."""
    found: set[str] = set()
    for item in ast.walk(ast.Module([i for i in tree.body if not _is_definition(i)], [])):
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
            found.add(item.id)
    for item in tree.body:
        if isinstance(item, _DEFINITIONS):
            found.add(item.name)
        if isinstance(item, ast.ClassDef) and item.name == "Solution":
            found |= {part.name for part in item.body if isinstance(part, _DEFINITIONS)}
        if isinstance(item, _IMPORTS):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in item.names}
    return found


def _is_definition(item: ast.stmt) -> bool:
    return isinstance(item, _DEFINITIONS)


def _text(item: ast.stmt) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The names a module loads and those it binds, in whatever scope."""
    used: set[str] = set()
    bound: set[str] = {"__name__", "__file__", "__doc__"}
    for item in ast.walk(tree):
        if isinstance(item, ast.Name):
            (used if isinstance(item.ctx, ast.Load) else bound).add(item.id)
        elif isinstance(item, _DEFINITIONS):
            bound.add(item.name)
        elif isinstance(item, ast.arg):
            bound.add(item.arg)
        elif isinstance(item, _IMPORTS):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ExceptHandler) and item.name:
            bound.add(item.name)
        elif isinstance(item, (ast.MatchAs, ast.MatchStar)) and item.name:
            bound.add(item.name)
    return used, bound
