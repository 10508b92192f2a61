"""``benchmarks/run.py`` as a user types it, and what is drawn."""

import json

import pytest

import run as cli
from kd_bench import plots


def kd_bench(*arguments):
    return cli.main(list(arguments))


def test_list_shows_what_would_be_measured(capsys):
    options = ["--list", "--device", "cpu", "--only", "linear", "--dtype", "bfloat16"]
    assert kd_bench(*options, "--tokens", "512") == 0
    assert capsys.readouterr().out == "linear/qwen2.5-0.5b<-1.5b/bfloat16/forward_kl\n"
    assert kd_bench("--list", "--smoke", "--device", "cpu", "--divergence", "jsd(0.5)") == 0
    listed = capsys.readouterr().out.split()
    assert "dense/smoke/float32/jsd(0.5)" in listed
    assert "selection/smoke/float32/forward_kl" in listed  # has no divergence


def test_a_whole_run_from_the_command_line(tmp_path, capsys):
    options = ["--smoke", "--device", "cpu", "--only", "selection", "--against", "pytorch"]
    options += ["--out", str(tmp_path), "--rounds", "2", "--seconds", "1", "--no-plots"]
    assert kd_bench(*options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "groups",
        "results.csv",
        "results.json",
    }
    assert kd_bench(*options) == 0
    assert "measured before" in capsys.readouterr().out
    results = tmp_path / "results.json"
    assert kd_bench("--compare", str(results), str(tmp_path)) == 0
    slower = json.loads(results.read_text())
    for entry in slower["benchmarks"]:
        entry["stats"]["min"] *= 3
    (tmp_path / "new.json").write_text(json.dumps(slower))
    old = json.loads(results.read_text())
    for entry in old["benchmarks"]:  # steps of a tenth of a millisecond are all noise
        entry["stats"]["median"] = entry["stats"]["min"]
    results.write_text(json.dumps(old))
    assert kd_bench("--compare", str(results), str(tmp_path / "new.json")) == 1


def test_fitted_exponent_is_the_slope_of_the_logarithms():
    sizes = [32.0, 64.0, 128.0]
    assert plots.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert plots.exponent(sizes, [2.0] * 3) == pytest.approx(0.0)


def scaling_group(vocab, seconds):
    row = {
        "suite": "dense",
        "implementation": "kd",
        "shape": {"name": f"scaling:V={vocab}", "vocab": vocab, "tokens": 8, "top_k": 4},
        "seconds": [seconds] * 3,
        "floor_seconds": [],
        "extra_memory": vocab * 1024,
    }
    return {"group": f"dense/scaling:V={vocab}/float32/forward_kl", "rows": [row]}


def test_scaling_plot_shows_each_series_with_its_exponent():
    pytest.importorskip("matplotlib")
    groups = [scaling_group(v, v * 1e-6) for v in (1000, 2000, 4000)]
    assert [plots.series_of(group) for group in groups] == ["V"] * 3
    figure = plots.scaling(groups, "V", "seconds")
    (legend,) = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == "dense, kd (grows as V^1.00)"
    assert plots.scaling(groups[:1], "V", "seconds") is None
    assert plots.scaling(groups, "N", "seconds") is None
