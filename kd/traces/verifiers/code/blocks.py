"""The blocks of code in an answer: where they begin and end, and what each defines and does."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Collection
from functools import cached_property
from itertools import islice

CLOSERS = 8  # lines tried as the end of a block
MARKS = 400  # fences looked at, from the end
BUDGET = 600_000  # characters parsed while looking for where blocks end
_OPEN = re.compile(
    r"^(?P<before>[ \t]*(?:>[ \t]?)*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})"
    r"[ \t]*(?P<info>[^`\n]*)$"
)
PYTHON = {"python", "py", "ipython"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
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


class Block:
    """One piece of code: its source, and what it defines, reads and does."""

    def __init__(self, source: str, closed: bool = True) -> None:
        self.source, self.closed = source, closed
        self.tree = parsed(source)

    @cached_property
    def defines(self) -> set[str]:
        if self.tree is None:
            found = r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)"
            return set(re.findall(found, self.source, re.M))
        return defined(self.tree)

    @cached_property
    def makes(self) -> set[str]:
        """What it defines by itself, with a body: an example of use may import the same name,
        and an outline may leave it open."""
        if self.tree is None:
            return self.defines
        own = [item for item in self.tree.body if not isinstance(item, _IMPORTS)]
        inner = [i for item in own if isinstance(item, ast.ClassDef) for i in item.body]
        written = [i for i in [*own, *inner] if isinstance(i, _FUNCTIONS)]
        left_open = {item.name for item in written if _is_open(item)}
        return defined(ast.Module(own, [])) - left_open

    @property
    def reads(self) -> bool:
        return _READS.search(self.source) is not None

    @cached_property
    def acts(self) -> bool:
        """Whether it does more than define."""
        if self.tree is None:
            return True
        passive = (*_DEFINITIONS, *_IMPORTS, *_ASSIGNMENTS)
        return any(
            not isinstance(item, passive) and not _is_output(item) for item in self.tree.body
        )

    @property
    def is_transcript(self) -> bool:
        return self.source.lstrip().startswith((">>>", "In ["))

    @property
    def is_code(self) -> bool:
        """Whether it is Python rather than output or prose that happens to parse."""
        if self.tree is None:
            return False
        return not all(map(_is_output, self.tree.body))

    @cached_property
    def missing(self) -> set[str]:
        """Names that it uses and neither defines nor has from Python."""
        if self.tree is None:
            return set()
        used, bound = _names(self.tree)
        return set() if "*" in bound else used - bound - set(dir(builtins))

    def definitions(self, needed: Collection[str]) -> str:
        """Its source without what it does; the input is read only into what is needed."""
        assert self.tree is not None
        lines = self.source.splitlines()
        kept = (*_DEFINITIONS, *_IMPORTS, *_ASSIGNMENTS)
        parts = []
        for item in self.tree.body:
            if isinstance(item, kept):
                above = [line.lineno for line in getattr(item, "decorator_list", [])]
                part = lines[min([item.lineno, *above]) - 1 : item.end_lineno]
                reading = isinstance(item, _ASSIGNMENTS) and _READS.search("\n".join(part))
                if not reading or defined(ast.Module([item], [])) & set(needed):
                    parts += part
        return "\n".join(parts)


def fenced(text: str) -> list[tuple[str, Block]]:
    """Every fenced block with its language, in order."""
    lines, found, left = text.split("\n"), [], BUDGET
    marks = [i for i, line in enumerate(lines) if _OPEN.match(line)][-MARKS:]
    at = marks[0] if marks else len(lines)
    while at < len(lines):
        opened = _OPEN.match(lines[at])
        if opened is None:
            at += 1
            continue
        language = _language(opened["info"])
        tried = CLOSERS if (language in PYTHON or not language) and left > 0 else 1
        block, at, parsed_so_far = _read_block(lines, at, opened, tried)
        left -= parsed_so_far
        if language in ("md", "markdown"):  # an answer that was put into a block as a whole
            found += fenced(block.source)
        else:
            found.append((language, block))
    return found


def _read_block(
    lines: list[str], at: int, opened: re.Match[str], tried: int
) -> tuple[Block, int, int]:
    """The block, the line after it, and how many characters were parsed to find its end: a fence
    in a docstring looks like it, so the first is taken before which the code parses."""
    fence = re.escape(opened["fence"][0])
    close = re.compile(rf"^[ \t>]*{fence}{{{len(opened['fence'])},}}[ \t]*$")
    after = range(at + 1, len(lines))
    ends = list(islice((i for i in after if close.match(lines[i])), tried))
    # the next block begins where this one was never closed
    begun = list(islice((i for i in after if _begins(lines[i], opened["fence"])), 1))
    if tried == 1:
        begun = []
    blocks, read = [], 0
    for end in ends + begun:
        block = Block(_inner(lines[at + 1 : end], opened["before"]))
        read += len(block.source)
        blocks.append((block, end if end in begun else end + 1, read))
        if block.tree is not None:
            return blocks[-1]
    if blocks:
        return min(blocks, key=lambda each: each[1])[:2] + (read,)
    rest = Block(_inner(lines[at + 1 :], opened["before"]), closed=False)
    return rest, len(lines), len(rest.source)


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
    return "python" if name.rstrip("0123456789") in PYTHON else name


def plain(text: str) -> Block | None:
    """The code of an answer without fences: the longest run of lines that parses, from a line
    that starts like code."""
    lines, left = text.split("\n"), BUDGET
    starts = [i for i, line in enumerate(lines) if _STARTS.match(line)][:5]
    for start in [0, *starts]:
        for end in range(len(lines), max(start, len(lines) - 40), -1):
            block = Block("\n".join(lines[start:end]) + "\n")
            left -= len(block.source)
            if block.tree is not None and block.is_code:
                return block
            if left < 0:
                return None
            if block.tree is not None:
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
    for item in ast.walk(ast.Module([i for i in tree.body if not isinstance(i, _DEFINITIONS)], [])):
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


def _is_output(item: ast.stmt) -> bool:
    """Whether it does nothing, as printed text that happens to parse."""
    if isinstance(item, ast.AnnAssign):
        return item.value is None
    return isinstance(item, ast.Expr) and isinstance(item.value, _OUTPUT)


def _is_open(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether its body is left out: a docstring, ``...``, ``pass``, or "not implemented"."""
    return all(
        isinstance(item, ast.Pass)
        or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
        or (isinstance(item, ast.Raise) and "NotImplemented" in ast.dump(item)[:200])
        for item in function.body
    )


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


def dotted(node: ast.AST) -> str:
    """A name, or a name and its attribute; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return ""
