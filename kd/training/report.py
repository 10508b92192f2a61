"""The log of a run as files: one JSON line an entry, a PNG of the curves, an HTML page."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kd.page import Page, subplots

METRICS, NAME = "metrics.jsonl", "training"
PANELS = (
    ("loss", ("loss", "eval_loss", "ce", "kd")),
    ("KL from the teacher by token", ("kd_think", "kd_answer", "kd_digit")),
    ("teacher: agreement, mass covered", ("teacher_top1_agreement", "teacher_mass")),
    ("gradient norm", ("grad_norm",)),
    ("tokens a second", ("tokens_per_second",)),
    ("learning rate", ("learning_rate",)),
)


def peak_memory(device: Any) -> float:
    """GiB: the allocator's peak on a GPU, the process's largest resident size on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def append_metrics(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add one entry of the log to ``metrics.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def write_report(folder: str | Path, log: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write a log's curves into ``folder`` as training.html and training.png.

    Args:
        folder: is made where it is missing.
        log: the entries of a ``TrainerState.log_history``.

    Returns:
        The page; None where matplotlib is not installed, or the log holds nothing to draw.
    """
    panels = [(title, names) for title, names in PANELS if any(_curve(log, n)[0] for n in names)]
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return None
    lines = -(-len(panels) // 2)
    figure, axes = subplots(10, 3 * lines, lines, 2)
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            steps, values = _curve(log, name)
            if steps:
                axis.plot(steps, values, label=name, marker="." if len(steps) < 30 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if "loss" in entry), {})
    shown = [
        (name, f"{value:.6g}" if isinstance(value, (int, float)) else value)
        for name, value in last.items()
    ]
    page = Page("Training").figure(figure, "Curves of the run", NAME)
    return page.heading("Last entry").table(["", ""], shown).save(Path(folder) / f"{NAME}.html")


def _curve(log: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
    return [step for step, _ in found], [value for _, value in found]
