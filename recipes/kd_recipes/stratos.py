"""Bespoke-Stratos as published: SFT of Qwen2.5 on 17k of R1's traces, without any logits.

    kd run stratos                              # offline: the same stages on a CPU, in minutes
    kd run stratos 7B --dry-run                 # memory and time before anything starts
    accelerate launch -m kd_recipes.stratos 7B  # on the GPUs found

The data set brings its own system prompt and writes thoughts as ``<|begin_of_thought|>``; both are
kept. The line from here on is ``r1_to_qwen``, which adds the teacher's logits.
"""

import sys

from kd.stages import run_recipe
from kd_recipes._presets import traces_alone
from kd_recipes.reasoning import main

__all__ = ["PRESETS", "main"]

PRESETS = traces_alone(
    "stratos",
    "Stratos: R1's traces alone",
    traces="bespokelabs/Bespoke-Stratos-17k",
    rows=16_700,
    sizes=("7B", "32B"),
)

if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
