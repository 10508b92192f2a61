"""bench: measured rows, answers checked first, resumed, skipped with a reason, compared."""

import dataclasses
import json
import time

import pytest
import torch

import kd
from kd_bench import compare, machine, plan, report, runner
from kd_bench.implementations import IMPLEMENTATIONS, Implementation
from kd_bench.inputs import (
    errors,
    exact_answer,
    first_rows,
    load,
    load_truth,
    make_inputs,
    parse_divergence,
    save,
    save_truth,
)
from kd_bench.peers import version_of
from kd_bench.runner import Group
from kd_bench.shapes import SMOKE_SHAPES, SUITES, floor_flops

SMOKE = SMOKE_SHAPES["smoke"]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_ours_and_pytorch_and_both_are_right(suite):
    inputs = make_inputs(suite, SMOKE, torch.float32)
    truth = exact_answer(suite, "forward_kl", inputs)
    for name in ("kd", "pytorch"):
        assert IMPLEMENTATIONS[name].takes(suite, "forward_kl")
        answer = IMPLEMENTATIONS[name].build(suite, "forward_kl", inputs)()
        found = errors(suite, answer, truth)
        assert found["value_error"] < 1e-5 and found["grad_error"] < 1e-5


def test_truth_is_the_reference_backends_answer():
    inputs = make_inputs("linear", SMOKE, torch.float32)
    truth = exact_answer("linear", "jsd(0.5)", inputs)
    hidden, weight = (inputs[n].double().requires_grad_() for n in ("hidden", "weight"))
    teacher = kd.Hidden(inputs["teacher_hidden"].double(), inputs["teacher_weight"].double())
    loss = kd.jsd(0.5)(kd.Hidden(hidden, weight), teacher, backend="reference")
    want = torch.autograd.grad(loss, [hidden, weight])
    assert truth.value == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(truth.gradients["hidden"], want[0])
    torch.testing.assert_close(truth.gradients["weight"], want[1][truth.ids])


def test_a_wrong_answer_shows_in_the_error_column():
    inputs = make_inputs("linear", SMOKE, torch.float32)
    truth = exact_answer("linear", "forward_kl", inputs)
    value, gradients = IMPLEMENTATIONS["kd"].build("linear", "forward_kl", inputs)()
    gradients["weight"] = 1.1 * gradients["weight"]
    assert errors("linear", (value, gradients), truth)["grad_error"] == pytest.approx(0.1, rel=1e-3)
    assert errors("linear", (2 * value, gradients), truth)["value_error"] == pytest.approx(1.0)


def test_inputs_and_truth_survive_their_files(tmp_path):
    for suite in SUITES:
        inputs = make_inputs(suite, SMOKE, torch.bfloat16)
        save(inputs, tmp_path)
        mapped = load(tmp_path)
        assert mapped.keys() == inputs.keys()
        assert all(torch.equal(mapped[name], inputs[name]) for name in inputs)
    truth = exact_answer("dense", "forward_kl", first_rows(make_inputs("dense", SMOKE, torch.half)))
    save_truth(truth, tmp_path / "truth.pt")
    again = load_truth(tmp_path / "truth.pt")
    assert again.value == truth.value
    assert torch.equal(again.gradients["logits"], truth.gradients["logits"])


def test_divergences_are_read_back_from_their_names():
    for d in (kd.forward_kl, kd.reverse_kl, kd.jsd(0.25), kd.alpha_beta(0.2, 0.7)):
        assert parse_divergence(str(d)) == d


def test_floor_counts_each_matmul_once():
    flops = 2 * SMOKE.tokens * SMOKE.vocab * (3 * SMOKE.student_hidden + SMOKE.teacher_hidden)
    assert floor_flops("linear", SMOKE) == flops
    assert floor_flops("dense", SMOKE) == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two groups really measured, in worker processes."""
    folder = tmp_path_factory.mktemp("bench")
    groups = plan.plan("cpu", smoke=True, suites=["linear", "dense"])
    options = dict(against=("chunk 128", "trl gkd"), rounds=2, seconds=2.0, say=lambda line: None)
    runner.run_groups(groups, folder / "groups", scratch=folder, **options)
    return folder, groups, options


def test_rows_hold_times_errors_and_memory(measured):
    folder, groups, _ = measured
    found = report.load_groups(folder)
    assert {group["group"] for group in found} == {group.name for group in groups}
    for group in found:
        ours = next(row for row in group["rows"] if row["implementation"] == "kd")
        assert len(ours["seconds"]) >= 2 and min(ours["seconds"]) > 0
        assert ours["grad_error"] < 1e-5 and ours["extra_memory"] >= 0
        assert group["ceilings"]["copy_bytes_per_second"] > 1e8
        assert group["machine"]["torch"] == torch.__version__
    assert not [path for path in folder.iterdir() if path.name.startswith("kd-bench-")]


def test_a_peer_that_is_not_installed_is_named(measured):
    if version_of("trl") is not None:
        pytest.skip("trl is installed here")
    text = report.as_markdown(report.load_groups(measured[0]))
    assert "| trl gkd |" in text and "not measured: trl is not installed" in text


def test_a_rerun_continues_and_a_broken_run_leaves_nothing_half_written(measured, monkeypatch):
    folder, groups, options = measured
    paths = sorted((folder / "groups").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in paths}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_group", interrupted)
    runner.run_groups(groups, folder / "groups", **options)  # all there: nothing is measured
    missing = Group("sparse", SMOKE, "float32")
    with pytest.raises(KeyboardInterrupt):
        runner.run_groups([*groups, missing], folder / "groups", **options)
    assert {p: p.stat().st_mtime_ns for p in (folder / "groups").iterdir()} == kept


def test_report_is_complete_and_self_contained(measured):
    folder = measured[0]
    pytest.importorskip("matplotlib")
    report.write_report(folder)
    results = json.loads((folder / "results.json").read_text())
    assert {"machine_info", "benchmarks", "datetime", "version"} <= results.keys()
    assert all(b["stats"]["rounds"] == len(b["stats"]["data"]) for b in results["benchmarks"])
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page
    assert "| kd |" in (folder / "README.md").read_text()
    lines = (folder / "results.csv").read_text().splitlines()
    assert lines[0].split(",") == list(report.COLUMNS)


def test_pieces_of_a_group_add_up(measured):
    """kd beside one peer, then beside another: one table, each ratio to its own run's floor."""
    group = report.load_groups(measured[0])[0]
    assert group["group"].startswith("linear/")  # suite by suite, as they are listed
    names = {row["implementation"] for row in group["rows"]}
    later = json.loads(json.dumps(group))
    for row in later["rows"]:  # a run on a machine twice as slow, with another peer
        row["seconds"] = [2 * s for s in row["seconds"]]
        row["floor_seconds"] = [2 * s for s in row["floor_seconds"]]
    peer = {**later["rows"][0], "implementation": "another"}
    both = runner.merged(group, {**later, "rows": [*later["rows"], peer]})
    rows = {row["implementation"]: row for row in both["rows"]}
    assert rows.keys() == names | {"another"}
    before = next(row for row in group["rows"] if row["implementation"] == "kd")
    assert len(rows["kd"]["seconds"]) == 2 * len(before["seconds"])
    ratios = [report.times_floor(r["seconds"], r["floor_seconds"]) for r in (before, rows["kd"])]
    assert ratios[0] == pytest.approx(ratios[1])


def test_what_does_not_fit_is_skipped_with_its_size(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 1 << 10)
    row = runner._new_row(Group("dense", SMOKE, "float32"), IMPLEMENTATIONS["pytorch"], "cpu")
    assert row["skipped"].startswith("needs about") and "GiB free" in row["skipped"]


def test_memory_needed_is_at_least_what_is_touched():
    """The guard must not let through what cannot fit: inputs, gradients, temporaries."""
    big = dataclasses.replace(SMOKE, tokens=100, vocab=1000, student_hidden=10, teacher_hidden=20)
    inputs = {"linear": 1100 * 30, "linear-sparse": 1100 * 10, "cross-entropy": 1100 * 10}
    inputs |= {"dense": 2 * 100_000, "sparse": 100_000, "selection": 100_000}
    for suite, elements in inputs.items():
        group = Group(suite, big, "float32")
        assert group.input_bytes() == 4 * elements
        gradients = 4 * 10_000 if "linear" in suite or suite == "cross-entropy" else 0
        wide = 7 * 4 * 100_000  # what plain PyTorch keeps of [N, V]
        assert group.needs(IMPLEMENTATIONS["pytorch"]) == 4 * elements + gradients + wide


def test_a_step_that_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch):
    """A worker that cannot even be made answers with its error, and ends when it is told to."""
    group = Group("linear", SMOKE, "float32")
    (tmp_path / "index.json").write_text("{}")
    broken = Implementation("no such implementation", ("linear",), lambda *a: None)
    process = runner.Process(tmp_path, group, "cpu", broken)
    row = {"implementation": broken.name}
    assert not runner._prepare(process, row, lambda line: None)
    assert "skipped" in row and row["skipped"]
    process.close()
    assert process.process.poll() is not None


class Sleeper:
    """Stands for a worker whose step takes a known time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def ask(self, command):
        started = time.perf_counter()
        time.sleep(self.seconds)
        return {"seconds": time.perf_counter() - started}


def timed_group(measured, scale):
    """A group of the fixture with its times measured anew, ours ``scale`` times as long."""
    group = json.loads(json.dumps(report.load_groups(measured[0])[0]))
    rows = {row["implementation"]: row for row in group["rows"] if row["seconds"]}
    for row in rows.values():
        row["seconds"] = []
    running = {name: Sleeper(0.05 * (scale if name == "kd" else 1.0)) for name in rows}
    runner._time(running, rows, rounds=4, seconds=5.0)
    return group


@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.3, 1)])
def test_compare_catches_an_injected_slowdown_of_30_percent(
    measured, tmp_path, scale, status, capsys
):
    for name, factor in (("old", 1.0), ("new", scale)):
        results = report.as_pytest_benchmark([timed_group(measured, factor)])
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert compare.run(tmp_path / "old", tmp_path / "new", threshold=0.15) == status
    assert ("SLOWER" in capsys.readouterr().out) == bool(status)


def test_compare_sees_memory_and_error_and_ignores_noise():
    options = dict(name="x/kd", before=1.0, noise=0.02, threshold=0.15)
    assert compare.Change(after=1.3, memory=None, error=None, **options).verdict == "SLOWER"
    assert compare.Change(after=1.1, memory=1.0, error=1.0, **options).verdict == "same"
    assert compare.Change(after=1.0, memory=1.5, error=1.0, **options).verdict == "MORE MEMORY"
    assert compare.Change(after=1.0, memory=1.0, error=9.0, **options).verdict == "LESS ACCURATE"
    assert compare.Change(after=0.7, memory=1.0, error=1.0, **options).verdict == "faster"
    noisy = {**options, "noise": 0.4}
    assert compare.Change(after=1.3, memory=None, error=None, **noisy).verdict == "same"


def test_compare_refuses_what_is_not_a_result(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="must be results of make bench or pytest-benchmark"):
        compare.run(tmp_path / "x.json", tmp_path / "x.json", 0.15)


def test_plan_says_what_is_wrong():
    with pytest.raises(ValueError, match="--only must be one of linear"):
        plan.plan("cpu", suites=["denze"])
    with pytest.raises(ValueError, match="must leave something to measure"):
        plan.plan("cpu", shapes=["no-such-model"])
    names = {group.name for group in plan.plan("cuda")}
    assert "linear/qwen2.5-7b<-r1-distill-32b/bfloat16/forward_kl" in names


def test_peak_memory_sees_what_was_freed():
    with machine.PeakMemory("cpu") as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    assert (60 << 20) < peak.extra < (90 << 20)
