"""A whole recipe, from traces to its report: the quickstart's preset that takes seconds.

What is checked is the middle of it: the log-probabilities in the cache that its students were
trained on, against the teacher in float64 on the same traces.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from kd_bench.shapes import Shape
from kd_bench.steps import Answer, Inputs, Truth

CHECKED = 32  # traces


def make(shape: Shape, dtype: torch.dtype) -> Inputs:
    return {"recipe_tokens": torch.tensor([shape.tokens])}


def truth(divergence: str, inputs: Inputs) -> Truth:
    """Nothing beforehand: what the recipe stored is checked when it has run."""
    return Truth(0.0, {}, torch.zeros(0, dtype=torch.long))


class Recipe:
    """``kd run quickstart smoke`` into a new folder."""

    detail = ""
    warm = False  # a cold start is what a recipe is

    def __init__(self) -> None:
        self.recipe: Any = importlib.import_module("kd_recipes.quickstart")

    def run(self, folder: Path) -> dict[str, Any]:
        preset = self.recipe.PRESETS["smoke"][1]
        return self.recipe.main(dataclasses.replace(preset, output=str(folder), fresh=True))

    def __call__(self) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            self.run(Path(folder))
        return torch.zeros(()), {}

    def errors(self) -> dict[str, float]:
        """Errors of what the recipe cached, relative for the value, of probabilities else."""
        from kd.cache import TeacherCache

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.run(folder)
            found = json.loads((folder / "teacher" / "stage.json").read_text())["result"]
            weights = Path(found["weights"])
            teacher = self.recipe.load_teacher(weights, found["hidden"], found["layers"]).double()
            cache = TeacherCache(folder / "cache" / "cache")
            rows = self.recipe.rows_of(folder / "traces")
            tokens, worst, ours, exact = 0, 0.0, 0.0, 0.0
            for row in rows:
                stored = cache.lookup(row["input_ids"])
                tokens += len(stored.ids)
            for row in rows.select(range(min(CHECKED, len(rows)))):
                stored = cache.lookup(row["input_ids"])
                with torch.no_grad():
                    logits = teacher(input_ids=row["input_ids"][None].long()).logits[0]
                want = torch.log_softmax(logits, -1).gather(-1, stored.ids.clamp(min=0)).exp()
                have = stored.logprobs.double().exp()
                want = torch.where(stored.ids < 0, 0.0, want)
                worst = max(worst, float((want - have).abs().max()))
                ours, exact = ours + float(have.sum()), exact + float(want.sum())
        self.detail = f"{len(rows)} traces, {tokens} tokens cached, 4 students trained"
        return {
            "value": ours / exact,
            "value_error": abs(ours / exact - 1),
            "grad_error": worst,
        }
