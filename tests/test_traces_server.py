"""Generation and judging against a real HTTP server that also answers 429, 500 and garbage."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kd.cli.main import main
from kd.traces import DropCounts, Sampling, Trace, load, verify, write_traces
from kd.traces.server import Server, generate_server
from kd.traces.verifiers.judge import Judge


class Teacher(BaseHTTPRequestHandler):
    """Misbehaves on the first tries of some prompts, for ever on others."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, state = body["messages"][-1]["content"], self.server.state
        with state["lock"]:
            state["asked"].append(body)
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
            tries = sum(b["messages"][-1]["content"] == prompt for b in state["asked"])
        state["gate"].wait(0.02)
        with state["lock"]:
            state["now"] -= 1
        misbehaviour = state["plan"].get(prompt, ())
        action = misbehaviour[min(tries - 1, len(misbehaviour) - 1)] if misbehaviour else "ok"
        if tries > len(misbehaviour) and action != "always 500":
            action = "ok"
        status, data = self.answer(action, prompt, body)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0.05")
        self.send_header("Content-Length", str(len(data) + (100 if action == "cut" else 0)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, action, prompt, body):
        if action in ("429", "500", "always 500", "400"):
            return int(action[-3:]), b'{"error": "as told"}'
        if isinstance(action, dict):  # a choice, as it is
            usage = {"prompt_tokens": 10, "completion_tokens": 20}
            return 200, json.dumps({"choices": [action], "usage": usage}).encode()
        if action == "garbage":
            return 200, b"<html>\xff not json"
        if action == "empty":
            return 200, b'{"choices": []}'
        content = f"re: {prompt} (seed {body.get('seed')})"
        if "[REFERENCE]" in prompt:
            content = "VERDICT: CORRECT" if "four" in prompt else "no idea"
        message = {"content": content, "reasoning_content": f"hm, {prompt}"}
        usage = {"prompt_tokens": 10, "completion_tokens": 20}
        answer = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        return 200, json.dumps(answer).encode()

    def log_message(self, *args):
        pass


@pytest.fixture()
def teacher():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.state = {
        "asked": [],
        "now": 0,
        "most": 0,
        "plan": {},
        "lock": threading.Lock(),
        "gate": threading.Event(),
    }
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.state, f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def client(address, **options):
    return Server(address, "teacher", wait=0.01, retries=3, timeout=5, **options)


def test_every_failure_is_retried_or_counted_and_order_is_kept(teacher):
    state, address = teacher
    state["plan"] = {
        "a": ["429", "500"],
        "b": ["garbage", "empty"],
        "c": ["always 500"],
        "d": ["400"],
        "e": ["cut"],
    }
    report = DropCounts()
    server = client(address, concurrency=4, input_price=1.0, output_price=2.0)
    traces = list(generate_server(server, list("abcdef"), report=report))
    assert [t.prompt for t in traces] == ["a", "b", "e", "f"]
    assert traces[0].think == "hm, a" and traces[0].answer.startswith("re: a")
    stage = report["generate"]
    assert stage.dropped == {"teacher failed: HTTP 500": 1, "teacher failed: HTTP 400": 1}
    assert stage.notes["completion_tokens"] == 80 and stage.notes["retries"] == 5
    assert stage.notes["cost"] == pytest.approx((40 * 1.0 + 80 * 2.0) / 1e6)
    # a client's own mistake is not repeated
    assert sum(b["messages"][-1]["content"] == "d" for b in state["asked"]) == 1
    assert state["asked"][0]["temperature"] == 0.6 and state["asked"][0]["top_p"] == 0.95


def test_concurrency_is_bounded_and_used(teacher):
    state, address = teacher
    server = client(address, concurrency=3)
    assert (
        len(list(generate_server(server, [str(i) for i in range(20)], report=DropCounts()))) == 20
    )
    assert 2 <= state["most"] <= 3


def test_a_rerun_asks_only_for_what_is_missing(teacher, tmp_path):
    state, address = teacher
    journal = tmp_path / "answers.jsonl"
    options = dict(sampling=Sampling(max_new_tokens=9), n=2, journal=journal)
    server = client(address)
    first = list(generate_server(server, ["a", "b"], report=DropCounts(), **options))
    assert [t.metadata["sample"] for t in first] == [0, 1, 0, 1]
    assert first[0].answer != first[1].answer
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while writing
    state["asked"].clear()
    assert list(generate_server(server, ["a", "b"], report=DropCounts(), **options)) == first
    assert len(state["asked"]) == 1
    list(generate_server(server, ["b", "a"], report=DropCounts(), **options))
    assert len(state["asked"]) == 1  # another order is the same content
    other = {**options, "sampling": Sampling(max_new_tokens=10)}
    list(generate_server(server, ["a"], report=DropCounts(), **other))
    assert len(state["asked"]) == 3


def test_a_judge_decides_is_undecided_or_fails_but_a_failure_is_not_wrong(teacher):
    state, address = teacher
    traces = [Trace("2+2", "t", "four", reference="4"), Trace("2+3", "t", "5", reference="5")]
    kept, report = verify(traces, Judge(client(address)))
    assert kept[0].answer == "four"
    assert report["verify"].dropped == {"unknown: judge undecided": 1}
    gone = Server("http://127.0.0.1:9/v1", "x", retries=0, timeout=1)
    _, report = verify(traces[:1], Judge(gone))
    assert report["verify"].dropped == {"error: verifier crashed": 1}


def test_a_server_that_is_not_there_is_counted(tmp_path):
    gone = Server("http://127.0.0.1:9/v1", "x", retries=0, timeout=1)
    report = DropCounts()
    assert not list(generate_server(gone, ["a"], report=report))
    assert report["generate"].dropped == {"teacher failed: server unreachable": 1}


def test_wrong_settings_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="Server: base_url must start with http"):
        Server("host:8000", "x")
    with pytest.raises(ValueError, match="key_variable must name a set environment variable"):
        Server("http://host/v1", "x", key_variable="KD_NO_SUCH_KEY")


def test_the_judge_on_the_command_line_beside_another_verifier(teacher, tmp_path, capsys):
    _, address = teacher
    traces = [Trace("2+2?", "t", "four", reference="4"), Trace("1+1?", "t", "2", reference="2")]
    write_traces(tmp_path / "in.jsonl", traces)
    options = ["--server", address, "--model", "m", "--beside", "numeric"]
    out = ["-o", str(tmp_path / "out.jsonl")]
    assert main(["traces", "judge", str(tmp_path / "in.jsonl"), *out, *options]) == 0
    shown = capsys.readouterr().out
    assert "judge / numeric agree, %" in shown and "unknown: judge undecided" in shown
    assert [trace.answer for trace in load(tmp_path / "out.jsonl")] == ["four"]


# --- answers without content ----------------------------------------------------------------------

CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
# The choice, why it has no content, the thought, the answer.
CHOICES = {
    "cut, reasoning": (
        {"message": {"content": None, "reasoning": "so and"}, "finish_reason": "length"},
        ("cut at the length limit", "so and", ""),
    ),
    "cut, reasoning_content": (
        {"message": {"content": "", "reasoning_content": "so and"}, "finish_reason": "length"},
        ("cut at the length limit", "so and", ""),
    ),
    "cut before a word": (
        {"message": {"role": "assistant", "content": None}, "finish_reason": "length"},
        ("cut at the length limit", "", ""),
    ),
    "refusal": (
        {"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"},
        ("refusal", "", ""),
    ),
    "tool call": (
        {"message": {"content": None, "tool_calls": CALL}, "finish_reason": "tool_calls"},
        ("tool call", "", ""),
    ),
    "tool call with a thought": (
        {"message": {"content": "", "reasoning": "I add", "tool_calls": CALL}},
        ("tool call", "I add", ""),
    ),
    "filter": (
        {"message": {"content": ""}, "finish_reason": "content_filter"},
        ("content filter", "", ""),
    ),
    "thought alone": (
        {"message": {"content": None, "reasoning": "four"}, "finish_reason": "stop"},
        ("no content", "four", ""),
    ),
    "nothing": ({"message": {"content": ""}, "finish_reason": "stop"}, ("no content", "", "")),
    "blank": ({"message": {"content": " \n"}, "finish_reason": None}, ("no content", "", "")),
    "no field": ({"message": {"role": "assistant"}}, ("no content", "", "")),
    "parts": (
        {"message": {"content": [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]}},
        ("", "", "four"),
    ),
    "tags": ({"message": {"content": "<think>hm</think>four"}}, ("", "hm", "four")),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_answer_without_content_is_an_answer(teacher, tmp_path, name):
    state, address = teacher
    choice, (reason, think, text) = CHOICES[name]
    state["plan"] = {"a": [choice] * 9}
    for _ in range(2):  # from the server, then from the journal
        report = DropCounts()
        options = {"report": report, "journal": tmp_path / "journal.jsonl"}
        (trace,) = generate_server(client(address), ["a"], **options)
        assert (trace.think, trace.answer) == (think, text)
        assert trace.metadata.get("without_content", "") == reason
        assert report["generate"].notes["retries"] == 0 and not report["generate"].dropped
        assert report["generate"].notes.get("without_content", {}) == (
            {reason: 1} if reason else {}
        )
        assert trace.metadata["finish"] == (choice.get("finish_reason") or "")
    assert len(state["asked"]) == 1
    for field in ("refusal", "tool_calls"):
        assert trace.metadata.get(field) == choice["message"].get(field)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"message": None},
        {"message": "four"},
        {"message": []},
        {"message": {"content": 4}},
        {"message": {"content": {"text": "four"}}},
        {"message": {"content": ["four"]}},
        {"message": {"content": [{"type": "image"}]}},
        {"message": {"content": None, "reasoning": 4}},
        {"message": {"content": "four", "reasoning_content": {"text": "hm"}}},
    ],
)
def test_what_is_no_message_is_garbage_and_asked_again(teacher, choice):
    state, address = teacher
    state["plan"] = {"a": [choice], "b": [choice] * 9}
    report = DropCounts()
    (trace,) = generate_server(client(address), ["a", "b"], report=report)
    assert trace.prompt == "a" and report["generate"].notes["retries"] == 1
    assert report["generate"].dropped == {"teacher failed: garbage from the server": 1}


@pytest.mark.parametrize("name", ["cut, reasoning", "refusal", "filter", "nothing"])
def test_a_judge_without_a_word_is_undecided(teacher, name):
    state, address = teacher
    judge, trace = Judge(client(address)), Trace("2+2", "t", "four", reference="4")
    judge(trace)
    state["plan"] = {state["asked"][0]["messages"][-1]["content"]: ["ok", CHOICES[name][0]]}
    assert judge(trace).reason == "judge undecided"


def test_what_was_answered_is_kept_when_the_reader_stops(teacher, tmp_path):
    state, address = teacher
    journal = tmp_path / "answers.jsonl"
    server = client(address, concurrency=4)
    stream = generate_server(
        server, [str(i) for i in range(8)], report=DropCounts(), journal=journal
    )
    next(stream)
    stream.close()
    answered = len(state["asked"])
    assert answered >= 2 and len(journal.read_text().splitlines()) == answered

    def broken():
        yield from ["x", "y"]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        list(generate_server(server, broken(), report=DropCounts(), journal=journal))
    state["asked"].clear()
    assert (
        len(list(generate_server(server, ["0", "x", "y"], report=DropCounts(), journal=journal)))
        == 3
    )
    assert not state["asked"]


def test_a_server_that_echoes_the_key_gets_it_into_no_report(teacher, tmp_path, monkeypatch):
    state, address = teacher
    monkeypatch.setenv("KD_KEY", "sk-0123456789abcdef")
    echo = {"message": {"content": "sk-0123456789abcdef", "reasoning": 7}}
    state["plan"] = {"a": [echo] * 9}
    report, journal = DropCounts(), tmp_path / "journal.jsonl"
    server = client(address, key_variable="KD_KEY")
    assert not list(generate_server(server, ["a"], report=report, journal=journal))
    assert "garbage" in json.dumps(report.to_dict()) and "***" in json.dumps(report.to_dict())
    state["plan"] = {"b": [{"message": {"content": "your key: sk-0123456789abcdef"}}]}
    (trace,) = generate_server(server, ["b"], report=report, journal=journal)
    shown = json.dumps(report.to_dict()) + str(report) + journal.read_text() + str(trace)
    assert trace.answer == "your key: ***" and "0123456789" not in shown + repr(server)
