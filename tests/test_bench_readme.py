"""The README's numbers come from the committed results, and bench_losses judges by its bounds."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from kd_bench import runner
from kd_bench.shapes import QWEN_05B_15B
from kd_bench.steps import is_floor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def group(ours, floor, extra_mib=100.0, kind="cpu"):
    """A result as the runner writes it, with times of our choice (a fixture, not a measurement)."""
    made = runner.Group("linear", QWEN_05B_15B, "float32")
    rows = []
    for name, seconds in (
        ("kd", ours),
        ("pytorch", [9.0] * 3),
        ("matmuls alone, chunk 256", floor),
    ):
        implementation = runner.IMPLEMENTATIONS[name]
        row = runner._new_row(made, implementation, "cpu")
        row.pop("skipped", None)
        row |= {"seconds": seconds, "floor_seconds": floor, "extra_memory": extra_mib * 2**20}
        row |= {"value_error": 1e-7, "grad_error": 3e-6}
        rows.append(row)
    machine = {"kind": kind, "device": "a test", "threads": 1, "kd": "0"}
    rates = {"copy_bytes_per_second": 1e10, "matmul_float32_flops_per_second": 1e11}
    return {
        "group": made.name,
        "rows": rows,
        "ceilings": rates,
        "machine": machine,
        "measured_at": "2026-01-01T00:00:00Z",
    }


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "a-test" / "groups"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps(group([4.2, 4.4, 4.3], [4.1, 4.2, 4.2])))
    return tmp_path / "results"


def test_readme_holds_what_was_measured_and_says_what_was_not(results):
    readme_table = script("readme_table")
    made = readme_table.table(results)
    ours, theirs = "**4.3 s, 100 MiB, 3e-06**", "9 s, 100 MiB, 3e-06"
    line = f"| fused linear KL, float32 | {ours} | {theirs} | - | - | - |"
    assert f"{line} {readme_table.UNMEASURED} |" in made
    assert "a test, 1 threads" in made and "| on a GPU |" in made
    assert len(made.splitlines()) == 5  # short: a newcomer reads it
    entry = json.loads((results / "a-test/groups/x.json").read_text())
    entry["machine"]["kind"] = "cuda"
    (results / "a-test/groups/y.json").write_text(json.dumps(entry))
    (results / "a-test/groups/x.json").unlink()
    assert readme_table.UNMEASURED not in readme_table.table(results)


def test_readme_shows_no_speed_without_its_error(results):
    entry = json.loads((results / "a-test/groups/x.json").read_text())
    for row in entry["rows"]:
        if row["implementation"] == "pytorch":
            del row["grad_error"]
    (results / "a-test/groups/x.json").write_text(json.dumps(entry))
    assert "9 s" not in script("readme_table").table(results)


def test_readme_is_written_between_its_markers_and_checked(results, tmp_path, capsys):
    readme_table = script("readme_table")
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{readme_table.BEGIN}\nold\n{readme_table.END}\nbelow\n")
    options = ["--results", str(results), "--readme", str(readme)]
    assert readme_table.main([*options, "--check"]) == 1
    assert readme_table.main([*options, "--write"]) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "\nold\n" not in text
    assert readme_table.main([*options, "--check"]) == 0
    readme.write_text("no markers")
    assert readme_table.main([*options, "--write"]) == 1
    assert "must hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "extra", "good"), [(4.3, 100, True), (4.5, 100, False), (4.3, 400, False)]
)
def test_bounds_on_time_and_memory_are_judged(ours, extra, good, capsys):
    bench_losses = script("bench_losses")
    result = group([ours] * 3, [4.2] * 3, extra)
    assert bench_losses.table({result["group"]: result}) == good
    assert ("MISSED" in capsys.readouterr().out) != good


def test_logits_bound_is_a_speedup_over_trl():
    bench_losses = script("bench_losses")
    made, bound = bench_losses.CASES["logits"]
    result = group([1.0] * 3, [4.0] * 3)
    peer = copy.deepcopy(result["rows"][1]) | {"implementation": "trl gkd", "seconds": [3.3] * 3}
    result["rows"].append(peer)
    value, median = bench_losses.ratios(made, result, result["rows"][0])
    assert value == median == pytest.approx(3.3)
    assert bench_losses.holds(made, bound, value, result["rows"][0])
    assert not bench_losses.holds(made, bound, None, result["rows"][0])


def test_committed_results_are_whole():
    """Whatever is committed under results/ is readable and shows no speed without its error."""
    found = sorted((BENCHMARKS / "results").glob("*/groups/*.json"))
    for path in found:
        for row in json.loads(path.read_text())["rows"]:
            if row["seconds"] and not is_floor(row["implementation"]):
                assert row["grad_error"] >= 0 and row["value_error"] >= 0, path
            assert row["seconds"] or row["skipped"], path
