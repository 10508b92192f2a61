"""Stages: done once, done again when something changed, shared by the ranks of a launch."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kd.files import read_json
from kd.progress import Progress
from kd.stages import Run, run_jobs

ROOT = Path(__file__).parents[1]
TWO_RANKS = """
import sys, time
from pathlib import Path
from kd.stages import Run

def first(folder):
    time.sleep(0.5)  # the others must wait for it
    (folder / "made").write_text("x")
    return {"made": 1}

def each(folder, first):
    assert (first.path / "made").is_file() and first.result == {"made": 1}
    (folder / f"rank-{run.rank}").write_text("x")
    return {"rank": run.rank}

run = Run(sys.argv[1], "two")
one = run.stage("first", first)
two = run.stage("each", each, every_rank=True, first=one)
assert two.result == {"rank": 0}  # the first process's, on both
"""


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1


def count(calls, **result):
    def function(folder, **inputs):
        calls.append(sorted(inputs))
        (folder / "file").write_text("x")
        return result

    return function


def test_a_stage_is_done_once_and_again_when_its_inputs_change(tmp_path):
    calls = []
    for rate in (0.1, 0.1, 0.2, 0.1):
        run = Run(tmp_path / "run", "demo")
        first = run.stage("first", count(calls, value=1), config=Settings(rate))
        run.stage("second", count(calls, value=2), first=first)
    assert len(calls) == 6  # two stages, three changes; the second run skipped both
    fresh = Run(tmp_path / "run", "demo", fresh=True)
    assert not fresh.stage("first", count(calls, value=1), config=Settings(0.1)).skipped


def test_a_file_counts_by_its_content(tmp_path):
    calls, file = [], tmp_path / "data.txt"
    for text in ("a", "a", "b"):
        file.write_text(text)
        Run(tmp_path / "run", "demo").stage("read", count(calls), data=file)
    assert len(calls) == 2


def test_an_interrupted_stage_finds_its_own_files_and_a_changed_one_does_not(tmp_path):
    def interrupted(folder, rate):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    found = []

    def resumed(folder, rate):
        found.append((folder / "half").exists())
        return {}

    for rate in (1, 2):
        run = Run(tmp_path / "run", "demo")
        with pytest.raises(KeyboardInterrupt):
            run.stage("train", interrupted, rate=1)
        run.stage("train", resumed, rate=rate)
        run.stage("train", resumed, rate=3)
    assert found == [True, False, False, False]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be numbers, text, lists, .*got object"):
        Run(tmp_path / "run", "demo").stage("stage", count([]), thing=object())


def test_two_processes_share_the_stages(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "recipes"))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    subprocess.run(
        [sys.executable, *command, "--standalone", str(script), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        timeout=120,
        capture_output=True,
    )
    assert {f.name for f in (tmp_path / "run" / "each").glob("rank-*")} == {"rank-0", "rank-1"}
    assert read_json(tmp_path / "run" / "first" / "stage.json")["result"] == {"made": 1}


def square(folder, report, *, number):
    report(0.5)
    if number < 0:
        raise ValueError("number must be at least 0")
    (folder / "calls").open("a").write("x")
    return {"square": number * number}


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_keep_their_order_and_the_first_failure_is_raised(workers, tmp_path):
    jobs = {tmp_path / str(number): {"number": number} for number in (3, 1, 2, -1)}
    with pytest.raises(ValueError, match="must be at least 0"):
        run_jobs(square, jobs, "squares", workers)
    jobs.popitem()
    for _ in range(2):  # the second time nothing is done again
        results = run_jobs(square, jobs, "squares", workers, threads=1)
        assert results == [{"square": 9}, {"square": 1}, {"square": 4}]
    assert {(folder / "calls").read_text() for folder in jobs} == {"x"}
    assert read_json(tmp_path / "3" / "result.json") == {"square": 9}


def test_the_list_of_recipes_needs_no_torch():
    """``kd recipes``, and every Tab in a shell, import all of them."""
    code = "import sys; from kd.stages import find_recipes; find_recipes(); "
    code += "print([name for name in ('torch', 'transformers', 'tyro') if name in sys.modules])"
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "recipes"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_progress_counts_what_was_found_apart_from_what_was_done(capsys, monkeypatch):
    monkeypatch.setattr("kd.progress.LOG_EVERY_S", 0.0)
    with Progress("teacher", 100, unit="tokens") as bar:
        bar.advance(50, fresh=False)
        assert "left" not in capsys.readouterr().err  # nothing to tell the speed from
        bar.advance(25)
        assert bar.done == 75 and bar.fresh == 25
        assert capsys.readouterr().err.startswith("teacher: 75 of 100 tokens, ")
        assert bar.line().endswith("0:00 left")
    with Progress("rendering", 8) as bar:
        bar.to(2, "(2 rows)")
    assert capsys.readouterr().err.startswith("rendering (2 rows): 25 %, ")
    with Progress("silent", 8, show=False) as bar:
        bar.to(2)
    monkeypatch.setenv("RANK", "1")
    with Progress("second", 8) as bar:
        bar.to(2)
    assert not capsys.readouterr().err
