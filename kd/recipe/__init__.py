"""Running a recipe: stages that are skipped when nothing they read has changed, with progress."""

from kd.files import read_json, write_json
from kd.recipe.catalog import Entry, entry, find_recipes, run_recipe
from kd.recipe.jobs import default_workers, one_thread, run_jobs
from kd.recipe.progress import Progress, say
from kd.recipe.stages import Run, Stage

__all__ = [
    "Entry",
    "Progress",
    "Run",
    "Stage",
    "default_workers",
    "entry",
    "find_recipes",
    "one_thread",
    "read_json",
    "run_jobs",
    "run_recipe",
    "say",
    "write_json",
]
