"""Running a recipe: stages that are skipped when nothing they read has changed, and their jobs."""

from kd.stages.catalog import Entry, entry, find_recipes, run_recipe, show_report
from kd.stages.jobs import default_workers, one_thread, run_jobs
from kd.stages.stages import Run, Stage

__all__ = [
    "Entry",
    "Run",
    "Stage",
    "default_workers",
    "entry",
    "find_recipes",
    "one_thread",
    "run_jobs",
    "run_recipe",
    "show_report",
]
