"""What the presets of several recipes have in common."""

from __future__ import annotations

from typing import Any

from kd_recipes.reasoning import OFFLINE, Config, Training

# The embedding and lm_head of 152k rows, most of a tiny model, stay as they are: half the time.
OFFLINE_TRAINING = Training(learning_rate=5e-4, batch=16, train_embeddings=False, checkpoints=2)
Presets = dict[str, tuple[str, Config]]


def offline(recipe: str, title: str, **settings: Any) -> Config:
    """Every stage on a CPU, with tiny models that know sums (``_offline_qwen``)."""
    common: dict[str, Any] = {
        "output": f"runs/{recipe}-offline",
        "max_traces": 200,
        "verifier": "exact",
        "max_length": 96,
        "problems": OFFLINE,
        "problem_verifier": "exact",
        "test_problems": 200,
        "max_new_tokens": 40,
    }
    return Config(recipe=recipe, title=title, **{**common, **settings})


def traces_alone(
    recipe: str, title: str, *, traces: str, rows: int, sizes: tuple[str, ...]
) -> Presets:
    """SFT as Sky-T1, Bespoke-Stratos and OpenThinker did it, for sizes of Qwen2.5-Instruct.

    Args:
        recipe: its name.
        title: of its report.
        traces: the hub's data set.
        rows: how many traces it has.
        sizes: of the students.
    """
    tiny = offline(
        recipe,
        title,
        teacher="",  # it writes the traces and is not needed later
        sft=OFFLINE_TRAINING,
        source="those of the offline r1_to_qwen, and its tags, which the tiny student knows",
    )
    presets: Presets = {"offline": ("Tiny models, the same stages: minutes on a CPU.", tiny)}
    for size in sizes:
        config = Config(
            recipe=recipe,
            title=title,
            output=f"runs/{recipe}-{size}",
            student=f"Qwen/Qwen2.5-{size}-Instruct",
            teacher="",
            traces=traces,
            tags="sky_t1",
            max_length=16_384,
            sft=Training(epochs=3.0, learning_rate=1e-5, warmup=0.1, batch=96),
            shape=size,
            rows_expected=rows,
            source="Sky-T1, Bespoke-Stratos and OpenThinker alike: 1e-5, cosine, warm-up 0.1, "
            "3 epochs, batch 96, 16k tokens",
        )
        words = f"Qwen2.5-{size}-Instruct on {traces.rpartition('/')[2]}, on GPUs."
        presets[size] = (words, config)
    return presets
