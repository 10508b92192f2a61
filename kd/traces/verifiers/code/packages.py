"""Whether a program failed for want of a package: that says nothing about the program.

Only what stands in its source counts. An error that it raises by itself, about a module of the
standard library or one that nobody knows, is its own failure.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions

from kd.sandbox import Run
from kd.traces.verifiers.code.blocks import dotted, parsed

# what programs of data sets import beside the standard library; packages installed here count too
KNOWN = frozenset(
    "attr attrs bitarray bs4 cachetools cv2 cvxpy cython dateutil gmpy2 graphviz hypothesis jax "
    "keras lxml matplotlib more_itertools mpmath msgpack nltk networkx numba numexpr numpy "
    "openpyxl pandas PIL plotly polars primefac psutil pulp pydantic pyparsing pytest pytz "
    "pyximport regex requests rich scipy seaborn shapely simplejson six sklearn skimage "
    "sortedcontainers statsmodels sympy tabulate tensorflow termcolor toml toolz torch tqdm "
    "typing_extensions ujson unidecode xgboost yaml z3 zmq".split()
)
_GUARDS = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
_LOST = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'", re.MULTILINE)
_LISTING = """
import json, pkgutil, sys
names = {module.name for module in pkgutil.iter_modules()}
print(NONCE + json.dumps(sorted(names.union(sys.stdlib_module_names, sys.builtin_module_names))))
"""


def modules(backend: Callable[[str, str], Run]) -> frozenset[str] | None:
    """The modules that programs can import in a sandbox; None where it does not say."""
    nonce = secrets.token_hex(8)
    run = backend(_LISTING.replace("NONCE", repr(nonce)), "")
    line = next((part for part in run.stdout.split("\n") if part.startswith(nonce)), "")
    try:
        return frozenset(json.loads(line.removeprefix(nonce)))
    except (ValueError, TypeError):
        return None


class Imports:
    """What a program imports from outside the standard library.

    Attributes:
        lines: the lines of the imports of each package, wherever they stand.
        certain: packages that it cannot run without: imported at the top, not in a ``try`` that
            takes their absence.
    """

    def __init__(self, program: str) -> None:
        self.lines: dict[str, set[int]] = {}
        self.certain: list[str] = []
        tree = parsed(program)
        if tree is None:
            return
        for node in ast.walk(tree):
            for name in _imported(node):
                if name not in sys.stdlib_module_names:
                    self.lines.setdefault(name, set()).add(node.lineno)  # type: ignore[attr-defined]
        for item in tree.body:
            self._top(item, guarded=False)

    def _top(self, item: ast.stmt, guarded: bool) -> None:
        if isinstance(item, (ast.Import, ast.ImportFrom)) and not guarded:
            self.certain += [n for n in _imported(item) if n in self.lines]
        elif isinstance(item, ast.Try):
            caught = any(map(_guards, item.handlers))
            for part in item.body:
                self._top(part, guarded or caught)


def lost(source: str, available: frozenset[str] | None, *, known: bool = True) -> str:
    """A package that a source needs from its first lines on and that is not there; "" for none.

    Args:
        source: a program, or tests.
        available: what can be imported where it runs; None: not known, and nothing is missed.
        known: only packages that are known to exist, since a program may invent one.
    """
    missed = set() if available is None else set(Imports(source).certain) - available
    return next((name for name in sorted(missed) if _known(name) or not known), "")


def lost_on_the_way(program: str, error: str, line: int, available: frozenset[str] | None) -> str:
    """A known package whose import failed while the program ran; "" for none.

    Args:
        program: its source.
        error: "Type: message" of the exception that ended it, or the end of its stderr.
        line: the last line of the program that the exception came through; an error that is raised
            anywhere but at an import of that package is the program's own.
        available: what can be imported where it ran.
    """
    named = _LOST.findall(error)
    name = named[-1].split(".")[0] if named else ""
    if not name or not _known(name) or (available is not None and name in available):
        return ""
    return name if line in Imports(program).lines.get(name, ()) else ""


def _known(name: str) -> bool:
    return name in KNOWN or name in _installed()


@functools.cache
def _installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [(node.module or "").split(".")[0]]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        if dotted(node.func) in ("__import__", "import_module", "importlib.import_module"):
            return [str(node.args[0].value).split(".")[0]]
    return []


def _guards(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(dotted(each) in _GUARDS for each in types)
