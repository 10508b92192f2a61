"""The page at the end of ``heal``: perplexities, closeness, what was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.page import Page, subplots
from kd.stages import Stage

ARMS = {"ce": "cross-entropy", "kd": "cross-entropy + KD"}
WHY = """The teacher's distribution says more about each token than the token alone: the less text
there is, the more that is worth. With three times as much fresh text, seen once, the gap between
the arms closes. Pure KD (--ce-weight 0 --kd-weight 1) copies a model that was itself trained on
other text, and stays behind on text of its kind."""
KINDS = {"test": "held-out text of the same kind", "other": "text of another kind"}


def write_report(
    folder: Path,
    config: Any,
    model: Stage,
    text: Stage,
    pruned: Stage,
    cache: Stage,
    students: Stage,
    scores: Stage,
) -> dict[str, Any]:
    """Tables, plots and samples on one page."""
    from kd.evaluation import (
        NATS,
        PERPLEXITY,
        compare_arms,
        compare_runs,
        percent,
        show_arms,
        spread,
    )

    page = Page("Heal: what do a model's own logits give back after pruning?")
    lines, result, runs = [], {}, students.result
    for part in [name for name in KINDS if name in text.result]:
        ends = {name: scores.result[name][part]["perplexity"] for name in ("before", "teacher")}
        arms = {label: [run[part]["perplexity"] for run in runs[a]] for a, label in ARMS.items()}
        if len(config.seeds) > 1:
            verdict = compare_arms(arms, ARMS["ce"], ARMS["kd"], PERPLEXITY)
        else:
            ce, kd = (runs[arm][0][part]["nats"] for arm in ARMS)
            verdict = compare_runs(ARMS["ce"], ARMS["kd"], ce, kd, NATS, "blocks of text")
        shown = show_arms(
            page.heading(f"Perplexity on {KINDS[part]}"),
            verdict,
            arms,
            config.seeds,
            {"pruned, not healed": ends["before"], "whole model": ends["teacher"]},
            PERPLEXITY,
            name=f"perplexity-{part}",
            drawn=["whole model"],
        )
        lines.append(f"perplexity on {KINDS[part]}\n{shown}")
        result[part] = {**arms, **ends, "verdict": verdict}
    page.heading("Closeness to the whole model").text(
        "On the held-out text: how often both like the same next token best, the divergence of "
        "the healed model from the whole one in nats, and the gap between the student's "
        "confidence in its likeliest token and the whole model's probability for that token."
    )
    measured = {"pruned, not healed": [scores.result["before"]]}
    measured |= {label: runs[arm] for arm, label in ARMS.items()}
    rows = []
    for label, found in measured.items():
        top1, kl, gap = (spread([f[k] for f in found])[0] for k in ("top1", "kl", "calibration"))
        rows.append([label, percent(top1), f"{kl:.3f}", percent(gap)])
    page.table(["", "same top token", "KL", "calibration gap"], rows)
    page.heading("What was done").text(
        _what_was_done(config, model.result, text.result, pruned.result, cache.result)
    )
    page.heading("Influence of the layers").text(
        "1 - cosine between what goes into a layer and what comes out; the least go first."
    )
    page.figure(_influence_figure(pruned.result), "Grey layers were dropped.", "influence")
    page.heading("When does KD help?").text(" ".join(WHY.split()))
    page.save(folder / "report.html")
    return {**result, "text": "\n\n".join(lines)}


def _what_was_done(config: Any, model: Any, text: Any, pruned: Any, cache: Any) -> str:
    from kd.evaluation import percent

    before, after = pruned["parameters"]
    return (
        f"{model['name']} of {before / 1e6:.1f} million parameters lost its layers "
        f"{', '.join(map(str, pruned['dropped']))} of {len(pruned['influence'])} and kept "
        f"{after / 1e6:.1f} million. Each student saw {text['train'] * config.length:,} tokens "
        f"{config.epochs} times, at a peak learning rate of {config.learning_rate:g}, with the "
        f"embeddings {'trained' if config.train_embeddings else 'frozen'}. The cache of the "
        f"top-{config.top_k} log-probabilities holds {percent(cache['mass'])} of the teacher's "
        f"probability in {cache['bytes'] / cache['tokens']:.0f} bytes per token. The KD arm weighs "
        f"cross-entropy with {config.ce_weight} and the divergence with {config.kd_weight}."
    )


def _influence_figure(pruned: Any) -> Any:
    figure, axes = subplots(height=2.4)
    influence, dropped = pruned["influence"], set(pruned["dropped"])
    colours = ["#c8ccd4" if i in dropped else "#3465a4" for i in range(len(influence))]
    axes.bar(range(len(influence)), influence, color=colours)
    axes.set_xlabel("layer")
    axes.set_yscale("log")
    return figure
