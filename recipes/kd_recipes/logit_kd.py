"""Plain white-box KD: a large Qwen's logits into a small one, online or from a cache.

    kd run logit_kd                                  # offline: the same stages on a CPU, in minutes
    kd run logit_kd 7B-to-0.5B --dry-run             # memory and time before anything starts
    accelerate launch -m kd_recipes.logit_kd 7B-to-0.5B
    kd run logit_kd offline --online                 # the teacher in memory, no cache

Both models read the same traces; the student learns from the divergence alone (``--kd.ce-weight``
mixes in the labels). Models of one family share their tokens, so nothing is remapped; only the
padding of the lm_heads differs (151,936 and 152,064 rows), and it takes no part. ``--control`` adds
the arm that learns from the same traces by cross-entropy.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from kd.stages import run_recipe
from kd_recipes._offline_qwen import OFFLINE_QWEN
from kd_recipes._presets import OFFLINE_TRAINING, offline
from kd_recipes.reasoning import Config, Training, main

__all__ = ["PRESETS", "main"]

TITLE = "Logit KD of one Qwen into a smaller one"
KD = Training(epochs=1.0, learning_rate=1e-5, warmup=0.1, batch=64, kd_weight=1.0, ce_weight=0.0)
CACHED = Config(
    recipe="logit_kd",
    title=TITLE,
    output="runs/logit_kd-7B-to-0.5B",
    student="Qwen/Qwen2.5-0.5B-Instruct",
    teacher="Qwen/Qwen2.5-7B-Instruct",
    traces="open-r1/OpenR1-Math-220k",
    max_traces=20_000,
    max_length=8192,
    sft=Training(epochs=0),
    kd=KD,
    shape="0.5B",
    mean_tokens=4000,
    source="a start: rate and schedule of SFT on traces (Sky-T1, Stratos)",
)
PRESETS = {
    "offline": (
        "Tiny models, the same stages: minutes on a CPU.",
        offline(
            "logit_kd",
            TITLE,
            teacher=OFFLINE_QWEN,
            sft=Training(epochs=0),
            kd=replace(OFFLINE_TRAINING, epochs=8.0, kd_weight=0.9, ce_weight=0.1),
            top_k=16,
            control=True,
            mean_tokens=4000,
            source="those of the offline r1_to_qwen",
        ),
    ),
    "7B-to-0.5B": ("Qwen2.5-7B into 0.5B from a cache, on GPUs.", CACHED),
    "7B-to-0.5B-online": (
        "The same with the teacher in memory.",
        replace(CACHED, output="runs/logit_kd-7B-to-0.5B-online", online=True),
    ),
    "32B-to-7B": (
        "Qwen2.5-32B into 7B from a cache, on GPUs.",
        replace(
            CACHED,
            output="runs/logit_kd-32B-to-7B",
            student="Qwen/Qwen2.5-7B-Instruct",
            teacher="Qwen/Qwen2.5-32B-Instruct",
            shape="7B",
        ),
    ),
}

if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
