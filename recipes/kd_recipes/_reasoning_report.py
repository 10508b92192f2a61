"""The page at the end of the reasoning road: arms with their spread, counts, settings, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.page import Page
from kd.stages import Stage


def write_report(
    folder: Path,
    config: Any,
    traces: Stage,
    rows: Stage,
    targets: Stage,
    arms: Stage,
    scores: Stage,
) -> dict[str, Any]:
    """The table, the plot, the plain words and some samples on one page."""
    from kd.evaluation import compare_arms, compare_runs, percent, show_arms

    found, labels = scores.result, _labels(config)
    names = {arm: [f"{arm}-{i}" for i in range(len(arms.result[arm]))] for arm in labels}
    values = {label: [found[n]["accuracy"] for n in names[arm]] for arm, label in labels.items()}
    ends: dict[str, float] = {
        name: found[name]["accuracy"] for name in ("before", "teacher") if name in found
    }
    if len(labels) == 1 or len(config.seeds) == 1:
        firsts = {label: found[names[arm][0]]["correct"] for arm, label in labels.items()}
        pair = firsts if len(firsts) == 2 else {"before": found["before"]["correct"], **firsts}
        (first, correct), (second, also_correct) = pair.items()
        verdict = compare_runs(first, second, correct, also_correct)
    else:
        verdict = compare_arms(values, labels["sft"], labels["kd"])
    page = Page(config.title)
    text = show_arms(page, verdict, values, config.seeds, ends)
    page.text(_what_was_done(config, rows.result))
    if "bytes" in targets.result:
        share = targets.result["covered"] / max(targets.result["tokens"], 1)
        page.text(
            f"The teacher's top-{config.top_k} take {targets.result['bytes']:,} bytes. "
            f"{percent(share)} of the student's completion tokens have a row of the teacher; the "
            "rest (tags that the two write differently) are trained by cross-entropy alone."
        )
    page.heading("Traces kept and dropped").code(traces.result["table"])
    page.code(rows.result["table"])
    page.heading("Samples").text("The first seed of each arm, before and the teacher.")
    shown = {"before": "before", **{names[arm][0]: label for arm, label in labels.items()}}
    for name, label in {**shown, "teacher": "teacher"}.items():
        if name in found:
            page.text(label).samples(found[name]["samples"][:4])
    page.save(folder / "report.html")
    return {"verdict": verdict, "text": text, "arms": values, **ends}


def _labels(config: Any) -> dict[str, str]:
    if not config.kd.epochs:
        return {"sft": "SFT"}
    if not config.sft.epochs:
        return {"sft": "SFT alone" if config.control else "before", "kd": "KD"}
    return {"sft": "SFT alone", "kd": "SFT + KD"}


def _what_was_done(config: Any, rows: Any) -> str:
    sft, kd = config.sft, config.kd
    said = f"{rows['rows']:,} traces of {rows['tokens']:,} tokens, {rows['trained']:,} trained on. "
    if sft.epochs:
        said += f"SFT: {sft.epochs:g} epochs at a peak rate of {sft.learning_rate:g}. "
    if kd.epochs:
        alone = "as much SFT again in the first arm" if config.control else "nothing more"
        said += (
            f"Then {alone}; in the other, {kd.epochs:g} epochs with {kd.kd_weight:g} times the "
            f"divergence at temperature {kd.temperature:g} and {kd.ce_weight:g} times "
            f"cross-entropy, {'the teacher in memory' if config.online else 'from a cache'}. "
        )
    return said + (
        f"{len(config.seeds)} seed(s); greedy answers to {config.test_problems} problems. "
        f"Hyper-parameters: {config.source}."
    )
