"""Sky-T1 as published: SFT of Qwen2.5-32B on 17k of QwQ's traces, without any logits.

    kd run sky_t1                              # offline: the same stages on a CPU, in minutes
    kd run sky_t1 32B --dry-run                 # memory and time before anything starts
    accelerate launch -m kd_recipes.sky_t1 32B  # on the GPUs found

The data set brings its own system prompt and writes thoughts as ``<|begin_of_thought|>``; both are
kept. The line from here on is ``r1_to_qwen``, which adds the teacher's logits.
"""

import sys

from kd.stages import run_recipe
from kd_recipes._presets import traces_alone
from kd_recipes.reasoning import main

__all__ = ["PRESETS", "main"]

PRESETS = traces_alone(
    "sky_t1",
    "Sky-T1: QwQ's traces alone",
    traces="NovaSky-AI/Sky-T1_data_17k",
    rows=17_000,
    sizes=("32B",),
)

if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
