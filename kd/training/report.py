"""The log of a run as files: one JSON line an entry, a PNG of the curves, an HTML page."""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

METRICS, PNG, HTML = "metrics.jsonl", "training.png", "training.html"
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
    """Write the curves of a log into ``folder``; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    panels = [(title, names) for title, names in PANELS if any(_curve(log, n)[0] for n in names)]
    if not panels:
        return None
    lines = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(lines, 2, figsize=(10, 3 * lines), squeeze=False)
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
    figure.savefig(folder / PNG, dpi=120)
    pyplot.close(figure)
    picture = base64.b64encode((folder / PNG).read_bytes()).decode()
    (folder / HTML).write_text(
        "<!doctype html><meta charset='utf-8'><title>Training</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto}"
        "td,th{padding:.2rem .8rem;text-align:left}img{max-width:100%}</style>"
        f"<h1>Training</h1><img alt='curves of the run' src='data:image/png;base64,{picture}'>"
        f"<h2>Last entry</h2>{_table(log)}"
    )
    return folder / HTML


def _curve(log: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
    return [step for step, _ in found], [value for _, value in found]


def _table(log: Sequence[Mapping[str, Any]]) -> str:
    last: Mapping[str, Any] = next((e for e in reversed(log) if "loss" in e), {})
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{value:.6g}</td></tr>"
        if isinstance(value, (int, float))
        else f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in last.items()
    )
    return f"<table>{rows}</table>"
