"""The README's numbers come from the committed results, and from nothing else."""

import json
from pathlib import Path

import pytest

import readme_table
from kd_bench import results

ROOT = Path(__file__).parents[1]
GROUP = "linear/qwen2.5-0.5b<-1.5b/float32/forward_kl"


def row(name, seconds):
    """A row as a run keeps it, with times of our choice (a fixture, not a measurement)."""
    extra = {"suite": "linear", "shape": {"name": "qwen2.5-0.5b<-1.5b", "tokens": 512}}
    extra |= {"dtype": "float32", "divergence": "forward_kl", "implementation": name, "note": ""}
    extra |= {"version": "", "least_flops": 1, "least_bytes": 1, "bare_seconds": seconds}
    extra |= {"extra_memory": 100 * 2**20, "value_error": 1e-7, "grad_error": 3e-6}
    extra |= {"machine": "a test, 1 threads", "measured_at": "2026-01-01T00:00:00Z", "command": ""}
    rates = {"copy_bytes_per_second": 1e10, "matmul_float32_flops_per_second": 1e11}
    return {"group": GROUP, "name": f"{GROUP}/{name}", "extra_info": extra | {"ceilings": rates},
            "stats": {"data": seconds}}  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """(folder of results, its one results.json as it is and as it becomes)."""
    path = tmp_path / "results" / "a-test" / "results.json"
    path.parent.mkdir(parents=True)
    data = {"machine_info": {"kind": "cpu"}, "not_measured": []}
    data["benchmarks"] = [row("kd", [4.2, 4.4, 4.3]), row("pytorch", [9.0] * 3)]

    def write(**changed):
        path.write_text(json.dumps(data | changed))

    write()
    return path.parents[1], data, write


def test_readme_holds_what_was_measured_and_says_what_was_not(measured):
    folder, _, write = measured
    made = readme_table.table(folder)
    ours, theirs = "**4.3 s, 100 MiB, 3e-06**", "9 s, 100 MiB, 3e-06"
    line = f"| fused linear KL, float32 | {ours} | {theirs} | - | - | - |"
    assert f"{line} {readme_table.UNMEASURED} |" in made
    assert "a test, 1 threads" in made and "| on a GPU |" in made
    assert len(made.splitlines()) == 5  # short: a newcomer reads it
    write(machine_info={"kind": "cuda"})
    assert readme_table.UNMEASURED not in readme_table.table(folder)


def test_readme_shows_no_speed_without_its_error(measured):
    folder, data, write = measured
    del data["benchmarks"][1]["extra_info"]["grad_error"]
    write()
    assert "9 s" not in readme_table.table(folder)


def test_readme_is_written_between_its_markers_and_checked(measured, tmp_path):
    readme = tmp_path / "README.md"
    marked = [
        f"{readme_table.MARK.format(name, 'begin')}\nold\n{readme_table.MARK.format(name, 'end')}\n"
        for name in ("benchmarks", "divergences")
    ]
    readme.write_text(f"above\n{''.join(marked)}below\n")
    options = ["--results", str(measured[0]), "--readme", str(readme)]
    assert readme_table.main([*options, "--check"]) == 1
    assert readme_table.main([*options, "--write"]) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "\nold\n" not in text
    assert readme_table.main([*options, "--check"]) == 0
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        readme_table.main([*options, "--write"])


def test_committed_results_are_whole_and_what_the_tables_show():
    """Whatever is committed under results/ is readable and shows no speed without its error."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/results.json"))
    assert paths
    for path in paths:
        kept = results.Results(path.parent)
        for found in kept.measured:
            extra = found["extra_info"]
            assert extra["bare"] or (extra["grad_error"] >= 0 and extra["value_error"] >= 0), path
        assert all(found["reason"] for found in kept.rows.values() if "stats" not in found), path
        text = (path.parent / "README.md").read_text()
        for name, rows in kept.groups().items():
            assert f"### {name}\n" in text and results.group_table(rows) in text, name
    assert readme_table.main(["--check"]) == 0
