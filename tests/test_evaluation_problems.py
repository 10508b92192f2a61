"""Problem sets from files and packages, and ``kd evaluate`` from the command line."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from kd.cli.main import main
from kd.evaluation import read_problems
from kd.teachers import build_cache
from kd.traces import CHATML
from kd_recipes._random_model import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoTokenizer

    found = tmp_path_factory.mktemp("model")
    random_model(found)
    tokenizer = AutoTokenizer.from_pretrained(found)
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<eos>")
    tokenizer.save_pretrained(found)
    return found


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"prompt": "1+1=", "reference": 2}\n\n'
        '{"prompt": "2+2=", "reference": "4", "domain": "sums"}\n'
    )
    return path


def failing(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_problems_of_a_file(problems, tmp_path):
    found = read_problems(problems)
    assert [(t.prompt, t.reference, t.domain) for t in found] == [
        ("1+1=", "2", ""),
        ("2+2=", "4", "sums"),
    ]
    assert len(read_problems(problems, 1)) == 1
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "reference": 1}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match=r"prompt and reference, got .*bad.jsonl:2"):
        read_problems(bad)
    bad.write_text("\n")
    with pytest.raises(ValueError, match="at least one problem, got none"):
        read_problems(bad)
    with pytest.raises(ValueError, match="must be an existing file, gym:NAME or lm-eval:TASK"):
        read_problems(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    "row, prompt, reference",
    [
        ({"question": "1+1?", "answer": 2}, "1+1?", "2"),
        ({"question": "1-1?", "answer": 0}, "1-1?", "0"),
        ({"problem": "p", "solution": "so", "answer": "0.0"}, "p", "0.0"),
        ({"Question": "q", "Answer": "yes"}, "q", "yes"),
        ({"instruction": "i", "response": "wrong", "ground_truth": "g"}, "i", "g"),
        ({"messages": [{"role": "user", "content": "m"}], "answer": "4"}, "m", "4"),
        (
            {
                "data_source": "x",
                "prompt": [{"role": "user", "content": "v"}],
                "reward_model": {"ground_truth": 0.0},
            },
            "v",
            "0.0",
        ),
        (
            {"prompt": "k", "think": "t", "answer": "a", "reference": "r", "metadata": {}},
            "k",
            "r",
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "marked", "array"])
def test_problems_come_in_any_columns_that_traces_load_takes(
    tmp_path, row, prompt, reference, form
):
    path = tmp_path / ("p.json" if form == "array" else "p.jsonl")
    text = json.dumps([row] if form == "array" else row)
    path.write_text(text, encoding="utf-8-sig" if form == "marked" else "utf-8")
    (found,) = read_problems(path)
    assert (found.prompt, found.reference, found.think, found.answer) == (prompt, reference, "", "")


def test_a_models_answer_is_no_reference(tmp_path):
    path = tmp_path / "p.jsonl"
    for row in (
        {"prompt": "k", "think": "t", "answer": "a", "reference": "", "metadata": {}},
        {"prompt": "k", "response": "a"},
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match="got no reference beside 'k' in p.jsonl:1"):
            read_problems(path)


def test_problems_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    found = read_problems("gym:chain_sum:min_terms=2,max_terms=2", 3, seed=5)
    assert len(found) == 3 and found == read_problems("gym:chain_sum:min_terms=2,max_terms=2", 3, 5)
    assert all(t.reference and t.metadata["gym"]["dataset"] == "chain_sum" for t in found)
    with pytest.raises(ValueError, match="must be a family of reasoning-gym"):
        read_problems("gym:no_such_family")
    with pytest.raises(ValueError, match="must be key=value, got 'few'"):
        read_problems("gym:chain_sum:few")


def test_two_models_on_problems_and_text(folder, problems, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    output = tmp_path / "out"
    arguments = ["--problems", problems, "--text", text, "--max-new-tokens", 4, "--output", output]
    arguments += ["--samples", 2, "--pass-at", "1,2", f"before={folder}", f"after={folder}"]
    assert main(["evaluate", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "pass@1",
        "pass@2",
        "before",
        "after",
        "perplexity",
        "do NOT differ",
        "report:",
    ):
        assert expected in printed
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page and "1+1=" in page
    found = json.loads((output / "results.json").read_text())
    assert found["before"]["problems"]["samples"] == 2
    assert found["before"]["text"] == found["after"]["text"]


def test_beside_a_teachers_cache(folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd.traces import Trace, render, write_traces

    traces = [Trace("1+1=", "one more", "2"), Trace("2+2=", "two more", "4")]
    write_traces(tmp_path / "traces.jsonl", traces)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sequences = [render(trace, tokenizer).input_ids for trace in traces]
    build_cache(model, sequences, tmp_path / "cache", tokenizer=tokenizer, top_k=8, progress=False)
    beside = ["--traces", tmp_path / "traces.jsonl", "--cache", tmp_path / "cache"]
    assert main(["evaluate", str(folder), *map(str, beside)]) == 0
    printed = capsys.readouterr().out
    assert "same top token" in printed and "0.000" in printed  # its own teacher
    other = tmp_path / "other"
    random_model(other)
    changed = AutoTokenizer.from_pretrained(other)
    changed.add_tokens(["<new>"])
    changed.save_pretrained(other)
    assert "must have the cache's tokenizer, got differences" in failing(capsys, other, *beside)


def test_a_server_is_asked_and_its_answers_are_kept(problems, tmp_path, capsys):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = "<think>\nhm\n</think>\n\n1 + 1 = 2."  # no bare answer
            body = json.dumps(
                {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    arguments = ["tiny", "--problems", problems, "--server", address, "--output", tmp_path / "out"]
    for _ in range(2):  # the second time nothing is asked again
        assert main(["evaluate", *map(str, arguments)]) == 0
        assert "50.0 %" in capsys.readouterr().out
    assert main(["evaluate", *map(str, arguments), "--verifier", "choice"]) == 0
    printed = capsys.readouterr().out
    assert "undecided, counted as wrong: 2 unknown: reference is not a letter" in printed
    assert "--verifier maths finds 1 of them correct" in printed
    server.shutdown()
    assert len(asked) == 2 and {request["model"] for request in asked} == {"tiny"}


def test_lm_eval_is_asked_through_its_package(monkeypatch, tmp_path, capsys):
    calls = []

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": {"gsm8k": {"exact_match": 0.25, "alias": "gsm8k"}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    arguments = ["evaluate", "some/model", "--problems", "lm-eval:gsm8k", "--limit", "5"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert calls[0]["tasks"] == ["gsm8k"] and calls[0]["limit"] == 5
    assert json.loads((tmp_path / "results.json").read_text()) == {"model": {"exact_match": 0.25}}


def test_lm_eval_missing_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install lm-eval" in failing(capsys, "m", "--problems", "lm-eval:gsm8k")


def test_command_lines_that_cannot_work(capsys, problems, tmp_path):
    assert "something to measure must be given" in failing(capsys, "model")
    assert "must be given together" in failing(capsys, "model", "--cache", tmp_path)
    server = ["--server", "http://x/v1", "--text", problems]
    assert "with --problems alone" in failing(capsys, "model", *server)
    more = ["--problems", problems, "--samples", 2, "--pass-at", "1,4"]
    assert "--pass-at must be from 1 to --samples (2), got 1,4" in failing(capsys, "model", *more)
    assert "different labels" in failing(capsys, "a/m", "b/m", "--problems", problems)
