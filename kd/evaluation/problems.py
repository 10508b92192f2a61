"""Problem sets: JSON lines, reasoning-gym's families, and lm-eval's tasks through its package."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from kd.traces import Trace, gym_problems
from kd.traces.columns import ShapeError
from kd.traces.loading import questions

GYM, LM_EVAL = "gym:", "lm-eval:"


def read_problems(source: str | Path, limit: int = 0, seed: int = 0) -> list[Trace]:
    """Problems as traces that wait for an answer.

    Args:
        source: a file of questions with their answers in any columns that ``kd.traces.load``
            knows (prompt and reference, question and answer, verl's, ...); or ``gym:NAME`` or
            ``gym:NAME:option=value,...`` for a family of reasoning-gym.
        limit: at most so many; 0 takes all of a file, and 200 of a family.
        seed: of a family; the same seed gives the same problems.

    Raises:
        ValueError: the source is unknown, empty, or a line of it is no problem.
    """
    text = str(source)
    if text.startswith(GYM):
        return _family(text.removeprefix(GYM), limit or 200, seed)
    if text.startswith(LM_EVAL):
        raise ValueError(
            f"read_problems: source must be problems with references, got {text}: lm-eval scores "
            f"its tasks itself. Run: kd evaluate MODEL --problems {text}"
        )
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"read_problems: source must be an existing file, gym:NAME or lm-eval:TASK, got "
            f"{text}. Check the path."
        )
    found = [_problem(place, problem) for place, problem in questions(path)]
    if not found:
        raise ValueError(
            f"read_problems: source must hold at least one problem, got none in {path}."
        )
    return found[: limit or None]


def _problem(place: str, found: Trace | ShapeError) -> Trace:
    if isinstance(found, Trace) and found.reference:
        return found
    wrong = found if not isinstance(found, Trace) else f"no reference beside {found.prompt[:60]!r}"
    raise ValueError(
        "read_problems: every record must be a question and its answer, such as prompt and "
        f"reference, got {wrong} in {place}. Rename the columns or drop the record."
    )


def _family(spec: str, size: int, seed: int) -> list[Trace]:
    name, _, rest = spec.partition(":")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ModuleNotFoundError(
            "problems of gym: need the package reasoning-gym", name="reasoning-gym"
        )
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f"read_problems: options of gym:{name} must be key=value, got {part!r}."
            )
        options[key] = _value(value)
    try:
        return gym_problems(name, size, seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"read_problems: gym:NAME must be a family of reasoning-gym with its options, got "
            f"{spec!r} ({str(error)[:120]})."
        ) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def run_lm_eval(task: str, model: str, limit: int = 0) -> dict[str, float]:
    """One of lm-eval's tasks, run and scored by lm-eval itself.

    Args:
        task: its name there, such as "gsm8k".
        model: a folder or a hub id.
        limit: at most so many documents; 0 takes all.

    Returns:
        Metric names to values, "..._stderr" among them.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("problems of lm-eval: need the package lm-eval", name="lm-eval")
    lm_eval: Any = importlib.import_module("lm_eval")
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model}", tasks=[task], limit=limit or None
    )
    figures = found["results"][task]
    return {key: float(value) for key, value in figures.items() if isinstance(value, (int, float))}
