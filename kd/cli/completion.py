"""``kd completion``: a script that completes commands, recipes, presets and options with Tab."""

from __future__ import annotations

import argparse
import dataclasses
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
        description="The words are those of this version; run it again after an update.",
        epilog="\n".join(["set it up once:", *(f"  {hint}" for hint in HINTS.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    known = words()
    print(_fish(known) if args.shell == "fish" else _bash(known, zsh=args.shell == "zsh"))
    return 0


def words() -> dict[str, list[str]]:
    """What may follow: "" for the first word, "run" for the second, "run heal" for the rest."""
    from kd.cli.main import AREAS, build_parser

    first = build_parser()
    found = {"": sorted(_choices(first))}
    for command in AREAS:
        parser = _choices(build_parser(command))[command]
        verbs = _choices(parser)
        found[command] = sorted([*verbs, *_options(parser)])
        for verb, inner in verbs.items():
            found[f"{command} {verb}"] = sorted(_options(inner))
    found |= _recipes()
    return found


def _recipes() -> dict[str, list[str]]:
    from kd.recipe.catalog import find_recipes

    recipes = find_recipes()
    names = [recipe.name for recipe in recipes]
    found = {"run": names, "recipes": names}
    for recipe in recipes:
        config = next(iter(recipe.presets.values()))[1]
        found[f"run {recipe.name}"] = [*recipe.presets, *_fields(config)]
    return found


def _fields(config: Any, prefix: str = "") -> list[str]:
    """The options tyro makes of a dataclass."""
    found = []
    for item in dataclasses.fields(config):
        name, value = prefix + item.name.replace("_", "-"), getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found += _fields(value, f"{name}.")
        else:
            found.append(f"--{name}")
    return found


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    options = (option for action in parser._actions for option in action.option_strings)
    return [option for option in options if option.startswith("--")]


def _bash(known: dict[str, list[str]], zsh: bool) -> str:
    lines = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += [
        "_kd() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" known=""',
        '  case "$COMP_CWORD" in',
        f'    1) known="{" ".join(known[""])}" ;;',
        '    *) case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in',
    ]
    # the words of "run heal" from the third word on; until then those of "run"
    pairs = [key for key in known if " " in key]
    for key in pairs:
        lines.append(f'      "{key}") [ "$COMP_CWORD" -gt 2 ] && known="{" ".join(known[key])}" ;;')
    lines += ["    esac", '    [ -z "$known" ] && case "${COMP_WORDS[1]}" in']
    for key in (key for key in known if key and " " not in key):
        lines.append(f'      {key}) known="{" ".join(known[key])}" ;;')
    lines += [
        "    esac ;;",
        "  esac",
        '  COMPREPLY=($(compgen -W "$known" -- "$current"))',
        '  [ ${#COMPREPLY[@]} -eq 0 ] && COMPREPLY=($(compgen -f -- "$current"))',
        "}",
        "complete -F _kd kd",
    ]
    return "\n".join(lines)


def _fish(known: dict[str, list[str]]) -> str:
    lines = [f"complete -c kd -n __fish_use_subcommand -f -a '{' '.join(known[''])}'"]
    for key in (key for key in known if key):
        first, _, second = key.partition(" ")
        when = f"__fish_seen_subcommand_from {first}"
        if second:
            when += f"; and __fish_seen_subcommand_from {second}"
        lines.append(f"complete -c kd -n '{when}' -a '{' '.join(known[key])}'")
    return "\n".join(lines)
