"""Stages: a named folder, a fingerprint of what went in, and a result; done once, then skipped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.files import read_json, write_json
from kd.progress import say

RUN_FILE = "run.json"
STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        name: its name.
        path: its folder, holding whatever it wrote.
        result: the JSON-able dict its function returned.
        fingerprint: of its inputs; a stage that reads this one carries it on.
        skipped: nothing had to be done.
    """

    name: str
    path: Path
    result: dict[str, Any]
    fingerprint: str
    skipped: bool


class Run:
    """The folder of one run of a recipe.

    Args:
        folder: made if missing; one that holds anything but a run of this recipe is refused.
        recipe: the recipe's name.
        fresh: forget earlier stages and do them again.

    Raises:
        FileExistsError: the folder belongs to something else.
    """

    def __init__(self, folder: str | Path, recipe: str, *, fresh: bool = False) -> None:
        # stages show their own progress; datasets reads this when it is imported
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        self.folder = Path(folder)
        self.recipe = recipe
        self.fresh = fresh
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.rank == 0:
            self._claim()
        self.wait()

    def _claim(self) -> None:
        marker = self.folder / RUN_FILE
        if marker.is_file():
            owner = read_json(marker).get("recipe")
            if owner != self.recipe:
                raise FileExistsError(
                    f"Run: folder must hold a run of {self.recipe!r}, got {self.folder} with a run "
                    f"of {owner!r}. Choose another with --output."
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"Run: folder must be empty or hold a run of {self.recipe!r}, got {self.folder} "
                "with other files. Choose another with --output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"recipe": self.recipe})

    def stage(
        self,
        name: str,
        function: Callable[..., dict[str, Any]],
        *,
        every_rank: bool = False,
        **inputs: Any,
    ) -> Stage:
        """Do a stage, unless it is done already from the same inputs.

        Args:
            name: the stage's folder under the run.
            function: called as ``function(folder, **inputs)``; returns a JSON-able dict. It finds
                its own earlier files in the folder if it was interrupted, and may continue.
            every_rank: run it on every process of ``accelerate launch``; otherwise rank 0 works
                and the others wait.
            **inputs: settings (JSON-able, dataclasses, paths) and earlier stages. Their
                fingerprint decides whether the stage is done.

        Returns:
            The finished stage.
        """
        path = self.folder / name
        wanted = fingerprint(inputs)
        record = read_json(path / STAGE_FILE)
        self.wait()  # every rank has read the record before anyone changes it
        if not self.fresh and record.get("fingerprint") == wanted and record.get("done"):
            if self.rank == 0:
                say(f"[bold]{name}[/]: unchanged, skipped")
            return Stage(name, path, record["result"], wanted, True)
        started = time.perf_counter()
        if self.rank == 0:
            if path.exists() and (self.fresh or record.get("fingerprint") != wanted):
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / STAGE_FILE, {"fingerprint": wanted, "done": False})
        self.wait()
        if self.rank == 0 or every_rank:
            result = function(path, **inputs)
        self.wait()
        if self.rank == 0:
            seconds = round(time.perf_counter() - started, 1)
            done = {"fingerprint": wanted, "done": True, "seconds": seconds, "result": result}
            write_json(path / STAGE_FILE, done)
            say(f"[bold]{name}[/]: done in {seconds:.1f} s")
        self.wait()
        return Stage(name, path, read_json(path / STAGE_FILE)["result"], wanted, False)

    def wait(self) -> None:
        """Every process of a distributed run meets here; a single process goes on."""
        if self.world_size > 1:
            from datetime import timedelta

            import torch
            from accelerate import PartialState

            # Without cpu=True two processes without a GPU would be strangers to each other. The
            # others wait here while the first renders or evaluates, which may take hours.
            cpu = not torch.cuda.is_available()
            PartialState(cpu=cpu, timeout=timedelta(days=2)).wait_for_everyone()


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A digest of settings and earlier stages, stable over processes and runs."""
    text = json.dumps(_plain(dict(inputs)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Stage):
        return {"stage": value.name, "fingerprint": value.fingerprint}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **{k: _plain(v) for k, v in fields.items()}}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        if value.is_file():
            return {"file": hashlib.sha256(value.read_bytes()).hexdigest()}
        return {"path": str(value)}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(
        "fingerprint: inputs must be numbers, text, lists, dicts, dataclasses, paths or stages, "
        f"got {type(value).__name__}. Pass what it was made from instead."
    )
