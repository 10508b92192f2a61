"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kd.traces.clock import DATE
from kd.traces.trace import TAGS


def add_rendering(verb: Any) -> None:
    """The options on which a rendering depends: the same for what is captured and trained on."""
    verb.add_argument(
        "--date",
        default=DATE,
        help="YYYY-MM-DD, told to a chat template that prints today's date (default: %(default)s, "
        "on every day)",
    )
    verb.add_argument(
        "--tags",
        choices=[*sorted(TAGS), "template"],
        default="r1",
        help="how a thought is written; template: as the chat template does (default: %(default)s)",
    )
    verb.add_argument(
        "--template-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the chat template, such as enable_thinking=true; may be given again",
    )


def rendering_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``add_rendering`` read, for a ``Renderer``."""
    options = {}
    for given in args.template_option:
        name, found, value = given.partition("=")
        if not found or not name.isidentifier():
            raise ValueError(
                "--template-option must be NAME=VALUE, such as enable_thinking=true, got "
                f"{given!r}."
            )
        try:
            options[name] = json.loads(value)
        except ValueError:  # a word
            options[name] = value
    return {"date": args.date, "tags": TAGS.get(args.tags), "template_options": options}
