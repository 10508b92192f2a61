"""Sky-T1 as published: SFT of Qwen2.5-32B on 17k of QwQ's traces, without any logits.

    kd run sky_t1                              # offline: the same stages on a CPU, in minutes
    kd run sky_t1 32B --dry-run                 # memory and time before anything starts
    accelerate launch -m kd_recipes.sky_t1 32B  # on the GPUs found

The data set brings its own system prompt and writes thoughts as ``<|begin_of_thought|>``; both are
kept. The line from here on is ``r1_to_qwen``, which adds the teacher's logits.
"""

from __future__ import annotations

from typing import Any

from kd_recipes._flow import Config, run
from kd_recipes._traces_alone import offline, published

SOURCE = (
    "Sky-T1, Bespoke-Stratos and OpenThinker alike: 1e-5, cosine, warm-up 0.1, 3 epochs, "
    "batch 96, 16k tokens"
)
PRESETS = {
    "offline": (
        "Tiny models, the same stages: minutes on a CPU.",
        offline("sky_t1", "Sky-T1: QwQ's traces alone"),
    ),
    **{
        size: (
            f"Qwen2.5-{size}-Instruct on Sky-T1_data_17k, on GPUs.",
            published(
                "sky_t1",
                "Sky-T1: QwQ's traces alone",
                size,
                traces="NovaSky-AI/Sky-T1_data_17k",
                rows=17_000,
                source=SOURCE,
            ),
        )
        for size in ("32B",)
    },
}


def main(config: Config) -> dict[str, Any]:
    """Run the recipe, or print its estimate; returns the figures of its report."""
    return run(config)


if __name__ == "__main__":
    import sys

    from kd.stages import run_recipe

    run_recipe(sys.modules[__name__], sys.argv[1:])
