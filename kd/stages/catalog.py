"""Finding recipes and turning a command line into their config."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from kd.progress import say
from kd.stages.stages import Stage

PACKAGE = "kd_recipes"


@dataclass(frozen=True)
class Entry:
    """A recipe: its name, the first line of its docstring, and its presets with theirs."""

    name: str
    summary: str
    presets: Mapping[str, tuple[str, Any]]
    module: ModuleType


def find_recipes(package: str = PACKAGE) -> list[Entry]:
    """Every module of the package that has ``PRESETS`` and ``main``, by name."""
    root = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(root.__path__) if m.name[0] != "_")
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [entry(module) for module in modules if hasattr(module, "PRESETS")]


def entry(module: ModuleType) -> Entry:
    """A recipe module as an entry."""
    name = _full_name(module).rpartition(".")[2]
    lines = (module.__doc__ or "").strip().splitlines()
    return Entry(name, lines[0] if lines else "", module.PRESETS, module)


def _full_name(module: ModuleType) -> str:
    """Its name, also where it is the program itself (``python -m``)."""
    return module.__spec__.name if module.__spec__ is not None else module.__name__


def run_recipe(
    module: ModuleType, arguments: Sequence[str] | None = None, prog: str | None = None
) -> Any:
    """``[PRESET] [--field value ...]`` to a config, and the recipe run with it.

    Args:
        module: has ``PRESETS`` ({name: (summary, config)}, the first is the default) and ``main``.
        arguments: the command line after the recipe's name; the process's own when None.
        prog: how the command was called, for its help.

    Returns:
        What ``main(config)`` returns. With ``--check`` among the arguments, the number of problems
        that two batches of the next training show; the stages before it are done as always.

    Raises:
        ValueError: there is no such preset.
    """
    import tyro

    rest = list(sys.argv[1:] if arguments is None else arguments)
    if "--check" in rest:
        return _check_recipe(module, [word for word in rest if word != "--check"], prog)
    recipe = entry(module)
    prog = prog or f"python -m {_full_name(module)}"
    preset = next(iter(recipe.presets))
    if rest and not rest[0].startswith("-"):
        preset = rest.pop(0)
    if preset not in recipe.presets:
        raise ValueError(
            f"{prog}: PRESET must be one of {', '.join(recipe.presets)}, got {preset!r}. "
            f"List them with: kd recipes {recipe.name}"
        )
    summary, default = recipe.presets[preset]
    listing = "\n".join(f"  {name:<12} {text}" for name, (text, _) in recipe.presets.items())
    description = f"{recipe.summary}\n\nPreset {preset!r}: {summary}\nAll presets:\n{listing}"
    config = tyro.cli(
        type(default), default=default, args=rest, prog=f"{prog} {preset}", description=description
    )
    return module.main(config)


def _check_recipe(module: ModuleType, arguments: Sequence[str], prog: str | None) -> int:
    """The checks of the next stage that trains, those that find the same in one."""
    from rich.markup import escape

    from kd.training import preflight

    try:
        with preflight.instead_of_training():
            run_recipe(module, arguments, prog)
    except preflight.Checked as found:
        pages: dict[str, preflight.Check] = {}
        for check in found.checks:
            _, _, what = check.title.partition(": ")
            pages.setdefault(what, check)
        for check in pages.values():
            say(escape(f"\n{check}"))
        count = sum(len(check.problems) for check in pages.values())
        say(f"\n{len(found.checks)} trainings, {count} problems; none was started.")
        return count
    say("nothing to check: every training of this run is done. --fresh does them again.")
    return 0


def show_report(report: Stage, *, browser: bool = False) -> dict[str, Any]:
    """Print what the last stage of a recipe found, and where its page is.

    Args:
        report: its result has a "text"; its folder has ``report.html``.
        browser: show the page there too, where there is a display.

    Returns:
        The stage's result.
    """
    from kd.page import open_page

    page = report.path / "report.html"
    say(f"\n{report.result['text']}\n\nreport: {page}")
    if browser:
        open_page(page)
    return report.result
