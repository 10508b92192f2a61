"""``kd completion``: the shell completes commands, recipes, presets and options with Tab."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

SHELLS = ("bash", "zsh", "fish")
HINTS = {
    "bash": "kd completion bash > ~/.local/share/bash-completion/completions/kd",
    "zsh": "kd completion zsh > ~/.kd-completion.zsh && echo 'source ~/.kd-completion.zsh' "
    ">> ~/.zshrc",
    "fish": "kd completion fish > ~/.config/fish/completions/kd.fish",
}


def add_parser(subparsers: Any) -> None:
    """Add ``kd completion``."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes kd's words with Tab",
        description="The script asks kd itself: it needs no update when kd has one.",
        epilog="\n".join(["set it up once:", *(f"  {hint}" for hint in HINTS.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import argcomplete

    print(argcomplete.shellcode(["kd"], shell=args.shell))
    return 0


def asked() -> bool:
    """Whether it is a shell that runs ``kd``, for the words that may follow."""
    return "_ARGCOMPLETE" in os.environ


def complete(build_parser: Callable[[str], argparse.ArgumentParser]) -> None:
    """Answer the shell from the parser of its command, and end the process."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(build_parser(words[1] if len(words) > 1 else ""))


def recipe_names(**_: Any) -> list[str]:
    """The recipes, as argcomplete asks for them."""
    from kd.stages.catalog import find_recipes

    return [recipe.name for recipe in find_recipes()]


def add_recipes(run: argparse.ArgumentParser) -> None:
    """Recipes, their presets and their settings as arguments of ``kd run``, to be completed.

    They are not parsed with it: tyro does that, when the recipe runs.
    """
    from kd.stages.catalog import find_recipes

    names = run.add_subparsers(metavar="NAME")
    for recipe in find_recipes():
        parser = names.add_parser(recipe.name, help=recipe.summary)
        parser.add_argument("preset", nargs="?", choices=list(recipe.presets))
        parser.add_argument("--check", action="store_true")
        for name in _settings(next(iter(recipe.presets.values()))[1]):
            parser.add_argument(f"--{name}")


def _settings(config: Any, prefix: str = "") -> list[str]:
    """What tyro calls the fields of a dataclass."""
    found = []
    for item in dataclasses.fields(config):
        name, value = prefix + item.name.replace("_", "-"), getattr(config, item.name)
        found += _settings(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found
