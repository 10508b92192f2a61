"""The kd traces command end to end, its report page, and the demo."""

import json
import re

import pytest
from traces_cases import CHATML_QWEN, byte_tokenizer, tiny_model

from kd.cli.main import main
from kd.traces import DropCounts, Trace, load, write_traces
from kd.traces.report import write_report


@pytest.fixture()
def files(tmp_path):
    rows = [
        {"prompt": f"What is {i}+1?", "response": f"<think>\ncount {i}\n</think>\n\n{i + 1}"}
        | {"answer": str(i + 1 + (i % 4 == 0))}
        for i in range(20)
    ]
    rows += [{"title": "no shape"}, {"prompt": "q", "response": "<think>a<think>b</think>c"}]
    rows += [rows[1]]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer(CHATML_QWEN).save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_pipeline_runs_from_raw_records_to_packed_rows_and_a_page(files, capsys):
    def kd(verb, *options):
        status = main(["traces", verb, *map(str, options), "--report", str(files / "n.json")])
        assert status == 0, capsys.readouterr().err

    evaluation = files / "bench.jsonl"
    evaluation.write_text('{"question": "What is 2 + 1"}\n')
    kd("load", files / "raw.jsonl", "-o", files / "a.parquet")
    kd("verify", files / "a.parquet", "--verifier", "numeric", "-o", files / "b.jsonl")
    options = ["--against", evaluation, "--evidence", files / "evidence.jsonl"]
    kd("filter", files / "b.jsonl", "-o", files / "c.jsonl", *options)
    kd("mix", f"{files / 'c.jsonl'}@2", "-o", files / "d.jsonl")
    kd(
        "render",
        files / "d.jsonl",
        "--tokenizer",
        files / "model",
        "--pack",
        512,
        "-o",
        files / "e.jsonl",
    )
    main(
        ["traces", "report", str(files / "d.jsonl"), "--report", str(files / "n.json")]
        + ["-o", str(files / "page.html")]
    )
    counts = DropCounts.from_dict(json.loads((files / "n.json").read_text()))
    assert list(counts.stages)[2:5] == ["filter", "dedupe exact", "decontaminate"]
    assert {name: (t.seen, t.kept) for name, t in counts.stages.items()} == {
        "load": (23, 22),
        "verify numeric": (22, 16),
        "filter": (16, 16),
        "dedupe exact": (16, 15),
        "decontaminate": (15, 14),
        "mix": (28, 28),
        "render": (28, 28),
    }
    assert counts["verify numeric"].dropped == {
        "wrong: different number": 5,
        "unknown: no reference": 1,
    }
    assert json.loads((files / "evidence.jsonl").read_text())["question"] == "What is 2 + 1"
    packs = [json.loads(line) for line in (files / "e.jsonl").read_text().splitlines()]
    assert sum(len(made["lengths"]) for made in packs) == 28
    page = (files / "page.html").read_text()
    assert "What is 1+1?" in page and "no known shape" in page


def test_generate_answers_problems_with_a_model_from_a_folder(files):
    (files / "p.jsonl").write_text('{"question": "1+1?", "answer": 2}\n{"nothing": 1}\n')
    out = files / "g.jsonl"
    options = ["--model", str(files / "model"), "-n", "2", "--max-new-tokens", "4"]
    assert main(["traces", "generate", str(files / "p.jsonl"), "-o", str(out), *options]) == 0
    traces = list(load(out))
    assert [t.reference for t in traces] == ["2", "2"] and traces[0].metadata["finish"]


def test_wrong_use_is_one_line_with_the_fix(files, capsys):
    assert main(["traces", "filter", str(files / "raw.jsonl"), "--max-tokens", "5"]) == 1
    assert "--max-tokens must come with --tokenizer" in capsys.readouterr().err
    assert main(["traces", "load", str(files / "gone.jsonl")]) == 1
    assert "path must exist" in capsys.readouterr().err


BAD = '{"title": "no shape"}\n{"messages": []}\noops\n'
TRACE = '{"prompt": "q", "think": "", "answer": "a", "reference": "b", "metadata": {}}\n'
WORDED = TRACE.replace('"a"', '"0.5"').replace('"b"', '"1/2"')


@pytest.mark.parametrize(
    "verb, text, words",
    [
        ("load", BAD, "1 of 3: no known shape. Name your columns: --column MINE=prompt"),
        ("load", "", "Check that the input holds records"),
        ("load", '{"question": "q"}', "1 of 1: question without an answer. Answer them first"),
        ("verify", TRACE, "1 of 1: wrong: .* Look at the examples"),
        ("verify", WORDED, "1 of 1: unknown: the same .* --verifier maths finds 1 of them correct"),
        ("verify", BAD, "1 of 3: no known shape"),
        ("filter", TRACE.replace('"a"', '""'), "1 of 1: empty answer"),
        ("filter", BAD, "1 of 3: no known shape"),
        ("select", BAD, "1 of 3: no known shape"),
        ("mix", BAD, "every source must hold traces, got none in x"),
        ("mix", TRACE, "reasoning_share must be one that the traces can give, got 0.5 of 0 with"),
        ("render", BAD, "1 of 3: no known shape"),
        ("report", BAD, "must hold traces, got none"),
        ("generate", BAD, "1 of 3: empty prompt"),
    ],
)
def test_no_row_out_is_an_error_of_every_verb_with_counts_and_the_cure(
    files, capsys, verb, text, words
):
    path, counts = files / "x.jsonl", files / "counts.json"
    path.write_text(text)
    more = {
        "verify": ["--verifier", "exact", "--keep", "correct"],
        "select": ["--best", "1"],
        "render": ["--tokenizer", str(files / "model")],
        "generate": ["--model", str(files / "model")],
        "mix": ["--reasoning-share", "0.5"] if text == TRACE else [],
    }
    counts.write_text("{}")
    options = ["-o", str(files / "out.jsonl"), "--report", str(counts), *more.get(verb, [])]
    assert main(["traces", verb, str(path), *options]) == 1
    told = capsys.readouterr()
    assert re.search(words, told.err) and told.err.count("\n") == 1
    assert (files / "out.jsonl").exists() == (verb == "report")
    assert ("out.jsonl is not written" in told.err) == (verb not in ("mix", "report"))
    if verb != "report":
        for reason, count in DropCounts.from_dict(json.loads(counts.read_text())).dropped.items():
            assert re.search(rf"(?m)^  - {re.escape(reason)} +{count}$", told.out)


def test_records_that_a_later_verb_cannot_read_are_counted_there(files, capsys):
    path, counts = files / "x.jsonl", files / "counts.json"
    path.write_text(TRACE + BAD)
    for verb, more in (("filter", []), ("mix", []), ("select", ["--best", "1"])):
        options = ["-o", str(files / "out.jsonl"), "--report", str(counts), *more]
        assert main(["traces", verb, str(path), *options]) == 0
        counted = DropCounts.from_dict(json.loads(counts.read_text()))[f"read for {verb}"]
        assert (counted.seen, counted.kept) == (4, 1) and counted.dropped["not JSON"] == 1


def test_your_own_columns_can_be_named_on_the_command_line(files, capsys):
    path, out = files / "x.jsonl", files / "out.jsonl"
    path.write_text('{"my_q": "1+1?", "my_a": "2", "gold": 2}\n')
    named = ["--column", "my_q=prompt", "--column", "my_a=response"]
    assert main(["traces", "load", str(path), "-o", str(out), *named]) == 0
    assert [(t.prompt, t.answer, t.reference) for t in load(out)] == [("1+1?", "2", "2")]
    assert main(["traces", "load", str(path), "--column", "my_q"]) == 1
    assert "--column must be MINE=KNOWN, such as my_q=prompt, got 'my_q'" in capsys.readouterr().err


def test_what_was_mended_in_a_write_is_a_note(files, capsys):
    path = files / "x.jsonl"
    path.write_text('{"prompt": "q", "response": "a", "note": "\\ud83d"}\n')
    for suffix in ("jsonl", "parquet"):
        assert main(["traces", "load", str(path), "-o", str(files / f"out.{suffix}")]) == 0
        told = capsys.readouterr().err
        assert told.startswith("note: write: text must be Unicode") and told.count("\n") == 1
        assert "in 1 of 1 rows of out." in told


def test_an_evaluation_question_that_cannot_be_read_is_refused(files, capsys):
    (files / "x.jsonl").write_text(TRACE)
    (files / "bench.jsonl").write_text('{"question": "q"}\noops\n')
    options = ["--against", str(files / "bench.jsonl")]
    assert main(["traces", "filter", str(files / "x.jsonl"), *options]) == 1
    assert "must hold questions only, got bench.jsonl:2: not JSON" in capsys.readouterr().err


def test_the_page_escapes_everything_and_loads_nothing(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    report = DropCounts()
    stage = report.stage(evil)
    stage.drop(evil, Trace(evil, evil, evil), evil)
    stage.keep()
    page = write_report(tmp_path / "r.html", report, [Trace(evil, evil, evil)], title=evil)
    text = page.read_text()
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    assert set(re.findall(r'(?:src|href)="(.{5})', text)) == {"data:"}


def test_the_demo_runs_the_whole_pipeline_with_real_verdicts(tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    options = ["-o", str(tmp_path), "--problems", "30", "--steps", "60"]
    assert main(["traces", "demo", *options]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["generate"]["kept"] == 60
    for counted in counts.values():
        assert counted["in"] == counted["kept"] + sum(counted["dropped"].values())
    assert page.read_text().startswith("<!doctype html>")
    for trace in load(tmp_path / "traces.jsonl"):
        assert trace.answer == trace.reference
    write_traces(tmp_path / "again.jsonl", load(tmp_path / "traces.jsonl"))
