"""``pytest benchmarks`` as a user runs it: rows kept, reruns continue, failures are rows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_bench import machine, plots, results

ROOT = Path(__file__).parents[1]
pytest.importorskip("pytest_benchmark")
pytest.importorskip("pytest_timeout")


def bench(folder, *options, of="bench_losses.py", cwd=ROOT, **environment):
    """The run, and its results.json."""
    benchmarks = str(ROOT / "benchmarks" / of)
    command = [sys.executable, "-m", "pytest", benchmarks, "--results", str(folder)]
    command += ["--smoke", "--seconds", "0.1", "-q", "-p", "no:cacheprovider", *options]
    # A worker of pytest-xdist, as this process may be, writes no benchmarks.
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    mine |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *sys.path)))}
    done = subprocess.run(
        command, cwd=cwd, env={**mine, **environment}, capture_output=True, text=True
    )
    found = list(folder.glob("*/results.json"))
    return done, json.loads(found[0].read_text()) if found else {}


CHOSEN = "(kd or (pytorch and not compiled) or bare) and not place and not loaded"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    done, data = bench(folder, "-k", f"(linear/smoke or dense/smoke) and ({CHOSEN})")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return folder, data


def test_rows_hold_times_errors_memory_and_where_they_come_from(measured):
    rows = {row["name"]: row for row in measured[1]["benchmarks"]}
    for suite in ("linear", "dense"):
        ours = rows[f"{suite}/smoke/float32/forward_kl/kd"]
        extra = ours["extra_info"]
        assert ours["stats"]["rounds"] == len(ours["stats"]["data"]) >= 3
        assert extra["grad_error"] < 1e-5 and extra["extra_memory"] >= 0
        assert extra["ceilings"]["copy_bytes_per_second"] > 1e8
        assert "torch 2" in extra["machine"] and extra["command"].startswith(
            "pytest bench_losses.py"
        )
        assert len(extra["bare_seconds"]) == (ours["stats"]["rounds"] if suite == "linear" else 0)
    absent = {row["implementation"]: row["reason"] for row in measured[1]["not_measured"]}
    assert "is not installed" in absent["trl gkd"] or "trl gkd" not in absent
    assert measured[1]["machine_info"]["kind"] == "cpu"


def test_tables_and_plots_are_made_of_them(measured):
    (folder,) = measured[0].iterdir()
    text = (folder / "README.md").read_text()
    assert "relative to bare GEMM" in text and "\n| kd |" in text
    lines = (folder / "results.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results.COLUMNS)
    assert len(lines) == 1 + sum(len(measured[1][k]) for k in ("benchmarks", "not_measured"))
    assert (folder / "plots" / "roofline.png").stat().st_size > 1000


def test_a_rerun_continues_and_what_ended_the_process_is_not_tried_again(measured):
    (path,) = measured[0].glob("*/results.json")
    before = json.loads(path.read_text())
    kept = dict(before, benchmarks=[r for r in before["benchmarks"] if "/kd" not in r["name"]])
    ended = next(r for r in before["benchmarks"] if r["name"].startswith("linear/smoke")
                 and r["name"].endswith("/kd"))  # fmt: skip
    head = {key: ended[key] for key in ("group", "name")}
    ended = {**head, "implementation": "kd", "version": "", "reason": results.UNFINISHED}
    path.write_text(json.dumps(kept | {"not_measured": [ended]}))
    done, after = bench(
        measured[0], "-k", "(linear/smoke or dense/smoke) and kd and not place and not trl"
    )
    path.write_text(json.dumps(before))
    assert done.returncode == 0, done.stdout[-2000:]
    names = [r["name"] for r in after["benchmarks"]]
    assert names == [r["name"] for r in kept["benchmarks"]] + ["dense/smoke/float32/forward_kl/kd"]
    assert after["not_measured"] == [ended]
    again = results.Results(path.parent, fresh=True)
    assert not again.has(names[0]) and results.Results(path.parent).has(names[0])


BROKEN = """
import bench_losses, dataclasses, torch
from bench_losses import problems as planned, Problem, SMOKE, DENSE
from kd_bench.suite import Implementation, Step

def fails(problem, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory.")

def wrong(problem, inputs):
    right = bench_losses.KD.build(problem, inputs)
    return Step(lambda: (2 * right()[0], right()[1]))

entrants = (Implementation("fails", fails), Implementation("wrong", wrong), bench_losses.PYTORCH)
BROKEN = dataclasses.replace(DENSE, implementations=entrants)

def problems(device, tokens, smoke):
    return [Problem(BROKEN, SMOKE)]

def test_broken(row, measure):
    measure(row)
"""


def run_broken(tmp_path, text, *options, stop=False):
    """(what pytest printed, results.json, README.md) of a suite of its own.

    stop: it is ended by SIGTERM in its first row.
    """
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("conftest.py", "pytest.ini"):
        copied = (ROOT / "benchmarks" / name).read_text()
        (folder / name).write_text(copied.replace("Path(__file__).parent)", "Path.cwd())"))
    (folder / "bench_broken.py").write_text(text)
    command = [sys.executable, "-m", "pytest", str(folder), "--results", str(tmp_path / "out")]
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    paths = (ROOT / "benchmarks", ROOT, ROOT / "kernels", *sys.path)
    process = subprocess.Popen(
        [*command, "--smoke", "--seconds", "0.1", "-q", "-p", "no:cacheprovider", *options],
        cwd=ROOT / "benchmarks",
        env={**mine, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        text=True,
    )
    while stop and process.poll() is None:
        time.sleep(0.5)
        if list((tmp_path / "out").glob("*/results.json")):
            process.terminate()
            break
    printed, _ = process.communicate()
    (path,) = (tmp_path / "out").glob("*/results.json")
    return printed, json.loads(path.read_text()), (path.parent / "README.md").read_text()


def test_a_failing_implementation_is_a_row_and_a_wrong_answer_is_never_timed(tmp_path):
    printed, data, text = run_broken(tmp_path, BROKEN)
    reasons = {row["implementation"]: row["reason"] for row in data["not_measured"]}
    assert "OutOfMemoryError: CUDA out of memory" in reasons["fails"]
    assert reasons["wrong"].startswith("wrong answer: value error 1.0e+00")
    assert [row["extra_info"]["implementation"] for row in data["benchmarks"]] == ["pytorch"]
    assert "1 failed, 1 passed, 1 skipped" in printed
    assert "not measured: OutOfMemoryError" in text and "not measured: wrong answer" in text


HANGS = BROKEN.replace(
    'raise torch.OutOfMemoryError("CUDA out of memory.")', "import time; time.sleep(200)"
)


@pytest.mark.slow
def test_a_step_that_hangs_is_a_row_and_the_run_goes_on(tmp_path):
    printed, data, _ = run_broken(tmp_path, HANGS, "-o", "timeout=40")
    reasons = {row["implementation"]: row["reason"] for row in data["not_measured"]}
    assert reasons["fails"] == results.UNFINISHED and "2 failed, 1 passed" in printed
    assert [row["extra_info"]["implementation"] for row in data["benchmarks"]] == ["pytorch"]


def test_a_run_that_is_stopped_tries_its_row_again(tmp_path):
    _, data, text = run_broken(tmp_path, HANGS, stop=True)
    (row,) = data["not_measured"]
    assert row["reason"] == "interrupted" and "not measured: interrupted" in text
    (folder,) = (tmp_path / "out").iterdir()
    assert not results.Results(folder).has(row["name"])


def test_one_card_is_used(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert machine.one_card() == "3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert machine.one_card() == "0"


def test_compare_shows_a_slowdown_of_30_percent(measured, tmp_path):
    data = json.loads(json.dumps(measured[1]))
    for row in data["benchmarks"]:
        if row["name"] == "dense/smoke/float32/forward_kl/kd":
            for key in ("min", "median", "mean", "max"):
                row["stats"][key] *= 1.3
    for name, found in (("old", measured[1]), ("new", data)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    recipe = (ROOT / "Makefile").read_text().split("bench-compare:")[1].split("\n\n")[0]
    command = recipe.split("$(BIN)/pytest-benchmark ")[1].replace("\\\n", " ")
    command = command.replace("$(OLD)", str(tmp_path / "old"))
    command = command.replace("$(NEW)", str(tmp_path / "new"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", *command.split()], capture_output=True, text=True
    )
    shown = done.stdout.split("'dense/smoke/float32/forward_kl/kd'")[1].split("\n\n")[0]
    assert "(1.30)" in shown and done.returncode == 0, done.stdout + done.stderr
    assert "(1.30)" not in done.stdout.replace(shown, "")


@pytest.mark.parametrize(("options", "said"), [
    (["--divergence", "denze"], "kd has no divergence called 'denze'"),
    (["--device", "cuda"], "torch sees no GPU here"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said(options, said, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done, _ = bench(tmp_path, "--collect-only", *options)
    assert done.returncode != 0 and said in done.stdout + done.stderr


@pytest.mark.slow
def test_every_suite_runs(tmp_path):
    done, data = bench(tmp_path, "-k", CHOSEN.replace(" and not loaded", ""), of="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    suites = {row["group"].partition("/")[0] for row in data["benchmarks"]}
    assert suites == {"linear", "linear-sparse", "cross-entropy", "dense", "dense-loaded", "sparse",
                      "selection", "cache-write", "cache-read", "cache-read-packed", "capture",
                      "training"}  # fmt: skip


# --- what is made of the rows ---------------------------------------------------------------------


def test_fitted_exponent_is_the_slope_of_the_logarithms():
    sizes = [32.0, 64.0, 128.0]
    assert plots.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert plots.exponent(sizes, [2.0] * 3) == pytest.approx(0.0)


def scaling_row(vocab, seconds):
    extra = {"suite": "dense", "implementation": "kd", "bare": False, "dtype": "float32"}
    extra |= {"shape": {"name": f"scaling:V={vocab}", "vocab": vocab, "tokens": 8, "top_k": 4}}
    extra |= {"divergence": "forward_kl", "version": "", "note": "", "bare_seconds": []}
    extra |= {"least_flops": 0, "least_bytes": 0, "extra_memory": vocab * 1024}
    rates = {"copy_bytes_per_second": 1e10, "matmul_float32_flops_per_second": 1e11}
    stats = {"data": [seconds] * 3, "median": seconds}
    return {"group": f"dense/scaling:V={vocab}/float32/forward_kl", "stats": stats,
            "extra_info": extra | {"ceilings": rates}}  # fmt: skip


def test_scaling_plot_shows_each_series_with_its_exponent():
    rows = [scaling_row(v, v * 1e-6) for v in (1000, 2000, 4000)]
    assert [plots.series_of(row) for row in rows] == ["V"] * 3
    figure = plots.scaling(rows, "V", "median_s")
    (legend,) = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == "dense, kd (grows as V^1.00)"
    assert plots.scaling(rows[:1], "V", "median_s") is None
    assert plots.scaling(rows, "N", "median_s") is None
    row = scaling_row(1000, 1.0)
    row["extra_info"]["shape"]["name"] = "scaling:N=128,V=1000"
    assert plots.series_of(row) == "V"


def test_command_names_no_path_of_this_machine():
    line = machine.command_line
    assert line(["benchmarks", "--results", "benchmarks/results"]) == (
        "pytest benchmarks --results benchmarks/results"
    )
    assert line(["/a/b/benchmarks", "--results=/a/b", "-k", "jsd(0.5)"]) == (
        "pytest benchmarks --results=b -k 'jsd(0.5)'"
    )
