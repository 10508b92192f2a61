"""Reads the command line, runs one subcommand, and turns errors into one line with the fix."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from kd.cli import completion

DESCRIPTION = """\
Distil large language models: reasoning traces, cached teacher logits, students, reports.

Start here:
  kd run quickstart               distil a tiny reasoning model on this machine (about 3 minutes)
  kd run heal                     prune a real model and heal it by KD (minutes on a CPU)
  kd recipes                      what else there is, with hardware and time
  kd run quickstart --help        every setting of a recipe, with its meaning
  kd doctor                       what this machine has, and what kd will use
"""
EPILOG = "Errors are one line with the fix; --debug (anywhere) shows the traceback."

# Areas that bring their own subcommand; loaded only when it is asked for.
AREAS = {
    "cache": ("kd.cli.cache", "build, verify and convert caches of teacher log-probabilities"),
    "traces": ("kd.cli.traces", "load, verify, filter, mix and render reasoning traces"),
    "evaluate": ("kd.cli.evaluate", "score models on problems, on text, and beside a teacher"),
    "doctor": ("kd.cli.doctor", "what this machine has, and what kd will use"),
    "completion": ("kd.cli.completion", "print a script that completes kd's words with Tab"),
}
# Errors a user can mend: their message says how, so their type is left out.
PLAIN_ERRORS = (ValueError, TypeError, OSError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``kd`` command.

    Args:
        argv: arguments after the program's name; the process's own when None.

    Returns:
        The exit status: 0 done, 1 an error (printed), 2 a wrong command line, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("KD_DEBUG") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if completion.asked():
            completion.complete(build_parser)
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("stopped: run the same command again to continue.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `kd recipes | head`
        sys.stderr.close()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if debug:
            raise
        print(one_line(error), file=sys.stderr)
        return 1


def one_line(error: BaseException) -> str:
    """An error as one line; the type only where the message is not written for a user."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if "pip install" in text:
            return f"error: {text}"
        return (
            f"error: {text}. Install it: pip install {package} (or pip install 'kd-llm[recipes]')"
        )
    if isinstance(error, PLAIN_ERRORS):
        return f"error: {text}"
    return f"error: {type(error).__name__}: {text} (kd --debug shows where)"


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "run":
        return _run(arguments[1:])
    parser = build_parser(command)
    if not arguments:
        parser.print_help()
        return 0
    args = parser.parse_args(arguments)
    handler: Any = getattr(args, "run", None) or getattr(args, "func", None)
    if handler is None:  # `kd cache` without a verb
        parser.parse_args([command, "--help"])
    return int(handler(args) or 0)


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of ``kd``; only the area of ``command`` is imported, the rest is listed."""
    parser = argparse.ArgumentParser(
        prog="kd",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    recipes = subparsers.add_parser("recipes", help="list the recipes and their presets")
    words = "show this recipe's documentation and presets"
    named = recipes.add_argument("name", nargs="?", help=words)
    named.completer = completion.recipe_names  # type: ignore[attr-defined]
    recipes.set_defaults(run=_recipes)
    run = subparsers.add_parser(
        "run", help="run a recipe: kd run NAME [PRESET] [--field value ...]"
    )
    if command == "run":
        completion.add_recipes(run)
    for name, (module, summary) in AREAS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _recipes(args: argparse.Namespace) -> int:
    from kd.stages.catalog import find_recipes

    found = find_recipes()
    if args.name is not None:
        found = [_named(args.name)]
        print((found[0].module.__doc__ or "").strip() + "\n")
    for recipe in found:
        if args.name is None:
            print(f"{recipe.name:<14} {recipe.summary}")
        for preset, (summary, _) in recipe.presets.items():
            print(f"  {preset:<12} {summary}")
    names = [recipe.name for recipe in found]
    first = "quickstart" if "quickstart" in names else (names or ["NAME"])[0]
    print(f"\nRun one: kd run {first} [PRESET] [--field value ...]")
    return 0


def _named(name: str) -> Any:
    from kd.stages.catalog import find_recipes

    found = {recipe.name: recipe for recipe in find_recipes()}
    if name not in found:
        raise ValueError(
            f"kd run: NAME must be one of {', '.join(found) or '(no recipe is installed)'}, "
            f"got {name!r}. List them with: kd recipes"
        )
    return found[name]


def _run(arguments: list[str]) -> int:
    from kd.stages.catalog import run_recipe

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: kd run NAME [PRESET] [--field value ...]\n")
        print("Runs a recipe; a run that was stopped continues when it is run again.")
        print("Every setting of a recipe: kd run NAME --help")
        print("Two batches of its next training, looked at and not trained: kd run NAME --check\n")
        _recipes(argparse.Namespace(name=None))
        return 0 if arguments else 2
    recipe = _named(arguments[0])
    found = run_recipe(recipe.module, arguments[1:], prog=f"kd run {recipe.name}")
    return int("--check" in arguments and found > 0)
