"""The report names its commands without the machine's paths, and shows the ahead-of-time gate."""

from pathlib import Path

from kd_bench import gate, machine

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_command_is_what_one_would_type():
    root = Path(machine.__file__).parents[2]
    line = machine.command_line
    assert line(["/opt/x/bin/kd", "bench", "--only", "linear"]) == "kd bench --only linear"
    out = str(root / "benchmarks" / "results")
    assert line(["/opt/x/bin/kd", "bench", "--results", out]).endswith(
        "--results benchmarks/results"
    )
    assert line(["/opt/x/bin/kd", f"--out={out}"]) == "kd --out=benchmarks/results"
    assert (
        line(["/opt/kd/__main__.py", "bench", "--out", "/tmp/a/b"]) == "python -m kd bench --out b"
    )
    script = str(root / "benchmarks" / "bench_losses.py")
    assert line([script, "f32", "--x", "jsd(0.5)"]) == (
        "python benchmarks/bench_losses.py f32 --x 'jsd(0.5)'"
    )


def test_gate_is_shown_where_it_lies_beside_the_results(tmp_path):
    assert gate.section(tmp_path / "some-machine") == [] and not gate.as_markdown(tmp_path / "x")
    (tmp_path / "aot").mkdir()
    head = "kernel,arch,CTAs,registers,spills,shared,CTA/SM,bits,SASS/el,MUFU/el,B/el,floor\n"
    rows = "dense forward_kl bf16 32000,sm_90,4,128,0,64,2,128,39.7,4.03,6,100%\n"
    rows += "dense jsd bf16 32000,sm_90,4,99,8,64,2,128,50,5.03,14,43%\n"
    rows += "dense jsd bf16 32000,sm_80,4,250,512,64,2,128,50,5.03,14,1%\n"
    (tmp_path / "aot" / "table.csv").write_text(head + rows)
    ((title, table),) = gate.section(tmp_path / "some-machine")
    assert title == "Ours, by family"
    assert "| dense | 2 | 128 | 8 | 39.7 to 50 | 4.03 to 5.03 | 6 to 14 | 43 % |" in table
    assert "(../aot/table.md)" in gate.as_markdown(tmp_path / "some-machine")


def test_committed_gate_stands_beside_its_peers():
    found = dict(gate.section(RESULTS / "some-machine"))
    assert "liger" in found["Whole operations, ours beside theirs"]
    assert "fla fused_kl_div 128256" in found["Single kernels, ours beside theirs"]
    assert "| selection" not in found["Ours, by family"]
    assert "| select top |" in found["Ours, by family"]
