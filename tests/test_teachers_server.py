"""A server teacher against a real HTTP server that answers as vLLM documents."""

import http.server
import json
import math
import threading
import time

import cache_cases as cases
import numpy as np
import pytest
import torch

from kd.cache import TeacherCache
from kd.teachers import ServerTeacher, build_cache_from_server

LIVE = 61


class Server:
    """An OpenAI-compatible server around a tiny model, with faults to order."""

    def __init__(self):
        self.model, self.requests, self.faults, self.keys = cases.teacher(), [], [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "drop":
                    self.connection.close()
                    return
                status = fault if isinstance(fault, int) else 200
                answer = outer.answer(body) if status == 200 else {"error": "overloaded"}
                if isinstance(answer, int):
                    status, answer = answer, {"error": "as told"}
                data = b"{half" if fault == "garbage" else json.dumps(answer).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body):
        tokens = body["prompt"]
        with torch.no_grad():
            logp = self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        k = body.get("prompt_logprobs") or body.get("logprobs")
        rows = [None]
        for row, token in zip(logp, tokens[1:], strict=False):
            top = row.topk(k).indices.tolist()
            chosen = top if token in top else [token, *top]
            rows.append({i: float(row[i]) for i in chosen})
        if body.get("echo"):
            named = [r and {f"token_id:{i}": v for i, v in r.items()} for r in rows]
            return {"choices": [{"logprobs": {"top_logprobs": [*named, {"token_id:1": -1.0}]}}]}
        full = [
            r and {str(i): {"logprob": v, "rank": 1, "decoded_token": "x"} for i, v in r.items()}
            for r in rows
        ]
        return {"id": "cmpl-1", "choices": [{"text": "a", "prompt_logprobs": full}]}


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def teacher(server, **options):
    settings = {"top_k": 5, "wait": 0.01, "max_wait": 0.05, "timeout": 20, "concurrency": 2}
    return ServerTeacher(server.url, "tiny", **{**settings, **options})


def sequences(count=8):
    return [item for item in cases.texts(3 * count, longest=12) if len(item) > 1][:count]


def build(server, items, path, codec="float32", drop=False, **options):
    return build_cache_from_server(
        teacher(server, **options),
        items,
        path,
        live_vocab=LIVE,
        codec=codec,
        on_failure="drop" if drop else "error",
        progress=False,
    )


@pytest.mark.parametrize("mode", ["prompt_logprobs", "echo"])
def test_row_i_is_for_the_token_after_token_i(server, tmp_path, mode):
    items = sequences()
    cache = build(server, items, tmp_path / "cache", mode=mode)
    for tokens in items:
        with torch.no_grad():
            wanted = server.model(tokens[None]).logits[0].log_softmax(-1)
        found = cache.lookup(tokens)
        assert found.ids.shape == (len(tokens), 6) and found.tail == "bucket"
        assert (found.ids[-1] == -1).all()  # a server never scores the token after the last
        for row in range(len(tokens) - 1):
            used = found.ids[row] >= 0
            assert used.sum() in (5, 6) and int(tokens[row + 1]) in found.ids[row].tolist()
            torch.testing.assert_close(
                found.logprobs[row][used], wanted[row][found.ids[row][used]], atol=1e-5, rtol=0
            )


def test_it_retries_what_may_pass(server, tmp_path):
    server.faults = [429, 503, "drop", "garbage", 500]
    cache = build(server, sequences(), tmp_path / "cache")
    assert len(cache) == 8 and len(server.requests) == 13


def test_it_gives_up_with_a_reason_and_resumes(server, tmp_path):
    items = sequences()
    server.faults = [None] * 5 + [503] * 40
    with pytest.raises(OSError, match="within 3 attempts, got HTTP 503.*run the same command"):
        build(server, items, tmp_path / "cache", retries=2, concurrency=1)
    kept = TeacherCache(tmp_path / "cache", partial=True)
    assert 0 < len(kept) < 8
    server.faults, before = [], len(server.requests)
    cache = build(server, items, tmp_path / "cache")
    assert len(cache) == 8 and len(server.requests) - before == 8 - len(kept)


def test_a_refusal_for_good_is_not_repeated(server, tmp_path):
    server.faults = [400]
    with pytest.raises(OSError, match="must accept the request, got HTTP 400: .*overloaded"):
        build(server, sequences(1), tmp_path / "cache")
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment_and_stays_there(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    asked = teacher(server, key_variable="SOME_KEY")
    server.faults = [401]
    with pytest.raises(OSError) as refused:
        asked.score(np.array([1, 2, 3], np.int32))
    assert server.keys == ["Bearer s3cret"]
    assert "s3cret" not in str(refused.value) and "s3cret" not in repr(asked)
    build(server, sequences(1), tmp_path / "cache", key_variable="SOME_KEY")
    for item in (tmp_path / "cache").iterdir():
        assert b"s3cret" not in item.read_bytes()


def test_requests_are_spaced(server):
    asked = teacher(server, requests_per_minute=600)
    start = time.monotonic()
    for _ in range(4):
        asked.score(np.array([1, 2, 3], np.int32))
    assert time.monotonic() - start >= 0.3  # three gaps of a tenth


def test_an_answer_that_does_not_fit(server):
    asked = teacher(server)
    tokens = np.array([1, 2, 3], np.int32)
    for answer, words in (
        ({}, "must hold choices"),
        ({"choices": [{"text": "a"}]}, "must hold prompt_logprobs, got none"),
        ({"choices": [{"prompt_logprobs": [None, {}]}]}, r"one element a token .3., got 2"),
        ({"choices": [{"prompt_logprobs": [None] * 4}]}, r"one element a token .3., got 4"),
        ({"choices": [{"prompt_logprobs": {"1": 2}}]}, "must hold prompt_logprobs, got none"),
        ({"choices": [{"prompt_logprobs": [1, 2, 3]}]}, "row 0: it must be a mapping"),
        ({"choices": [[]]}, "must hold choices"),
        ({"choices": {"0": {}}}, "must hold choices"),
        ([], "must hold choices"),
    ):
        server.answer = lambda body, answer=answer: answer
        with pytest.raises(ValueError, match=words):
            asked.score(tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"top_k": 0}, "top_k must be from 1"), ({"mode": "chat"}, "mode must be one of")],
)
def test_bad_settings(server, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        teacher(server, **options)
    with pytest.raises(ValueError, match="base_url must start with http"):
        ServerTeacher("localhost:8000", "tiny")
    with pytest.raises(ValueError, match="live_vocab or tokenizer must be given"):
        build_cache_from_server(teacher(server), [], "unused")
    with pytest.raises(ValueError, match="on_failure must be one of error, drop, got 'skip'"):
        build_cache_from_server(teacher(server), [], "unused", live_vocab=9, on_failure="skip")
    for options in ({"concurrency": 0}, {"requests_per_minute": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            teacher(server, **options)
    for bad in ([3], [3, LIVE]):
        with pytest.raises(
            ValueError, match=r"at least 2 tokens, all below live_vocab \(61\), got"
        ):
            build(server, [bad], tmp_path / "cache")


# --- a server that is not believed ----------------------------------------------------------------

TOKENS = np.array([7, 3, 9, 3, 5], np.int32)


def honest(body):
    """Rows of the prompt's next token at -1, and one other token at -2."""
    named = [None] + [
        {str(token): {"logprob": -1.0, "rank": 1}, str(40 + i): {"logprob": -2.0}}
        for i, token in enumerate(body["prompt"][1:])
    ]
    return {"choices": [{"text": "", "prompt_logprobs": named}]}


def at_row(row, change):
    """``change(element)`` at a row: element row + 1 of the answer."""

    def lie(rows):
        rows[row + 1] = change(rows[row + 1])
        return rows

    return lie


def given(value, token="44"):
    return lambda element: {**element, token: {"logprob": value}}


def own(value):
    return lambda element: {**element, next(iter(element)): value}


NEXT = "must include the prompt's own next token"
NAMED = "must be named 'N' with N a token id"
LIES = {
    "all null": (lambda rows: [None] * len(rows), 0, "must be a mapping"),
    "one null": (at_row(2, lambda _: None), 2, "must be a mapping"),
    "one empty": (at_row(2, lambda _: {}), 2, NEXT),
    "a row as a list": (at_row(1, lambda row: list(row.values())), 1, "must be a mapping"),
    "a row as text": (at_row(1, str), 1, "must be a mapping"),
    "shifted down": (lambda rows: [None, None, *rows[1:-1]], 0, "must be a mapping"),
    "shifted up": (lambda rows: [*rows[1:], None], 0, NEXT),
    "turned": (lambda rows: [None, *rows[:0:-1]], 0, NEXT),
    "without the next": (at_row(3, lambda row: {"44": row["43"]}), 3, f"{NEXT}, 5, got .44."),
    "the next at -inf": (at_row(3, own({"logprob": -math.inf})), 3, NEXT),
    "log-prob 3": (at_row(0, given(3.0)), 0, "log-prob of 44 must be at most 0, got 3.0"),
    "log-prob 0.002": (at_row(0, given(0.002)), 0, "must be at most 0"),
    "a probability": (at_row(0, given(0.25)), 0, "must be at most 0"),
    "NaN": (at_row(0, given(math.nan)), 0, "must be at most 0, got nan"),
    "inf": (at_row(0, given(math.inf)), 0, "must be at most 0"),
    "log-prob null": (at_row(1, given(None)), 1, "log-prob of 44 must be a number, got None"),
    "no log-prob": (at_row(1, own({"rank": 1})), 1, "log-prob of 9 must be a number"),
    "log-prob text": (at_row(1, given("-1.0")), 1, "must be a number, got '-1.0'"),
    "log-prob true": (at_row(1, given(False)), 1, "must be a number, got False"),
    "log-prob list": (at_row(1, own([-1.0])), 1, "must be a number"),
    "mass": (at_row(2, given(-0.1)), 2, "must be at most 1 in sum, got 1.40"),
    "mass of zeros": (at_row(2, lambda row: dict.fromkeys(row, 0.0)), 2, "at most 1 in sum, got 2"),
    "past the vocabulary": (at_row(2, given(-9.0, "61")), 2, r"below live_vocab \(61\), got 61"),
    "far past it": (at_row(2, given(-9.0, "9" * 30)), 2, "below live_vocab"),
    "negative": (at_row(2, given(-9.0, "-1")), 2, NAMED),
    "a name": (at_row(2, given(-9.0, "the")), 2, NAMED),
    "a float": (at_row(2, given(-9.0, "7.0")), 2, NAMED),
    "a second way": (at_row(2, given(-9.0, "044")), 2, NAMED),
    "underscore": (at_row(2, given(-9.0, "4_4")), 2, NAMED),
    "space": (at_row(2, given(-9.0, " 44")), 2, NAMED),
    "other digits": (at_row(2, given(-9.0, "\u0667")), 2, NAMED),
    "of the echo": (at_row(2, given(-9.0, "token_id:44")), 2, NAMED),
    "more than asked": (
        at_row(0, lambda row: {**row, **{str(i): -20.0 for i in range(50, 56)}}),
        0,
        "at most 6 tokens, got 8",
    ),
}


def lying(server, lie, only=None):
    def answer(body):
        made = honest(body)
        if only is None or body["prompt"] == only:
            made["choices"][0]["prompt_logprobs"] = lie(made["choices"][0]["prompt_logprobs"])
        return made

    server.answer = answer


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_with_its_sequence_and_row(server, tmp_path, name):
    lie, row, words = LIES[name]
    lying(server, lie)
    with pytest.raises(ValueError, match=f"ServerTeacher: row {row}: .*{words}"):
        teacher(server).score(TOKENS, LIVE)
    with pytest.raises(
        ValueError, match=rf"sequence \w+ \(5 tokens: 7, 3, 9.*row {row}: .*{words}"
    ):
        build(server, [TOKENS], tmp_path / "cache")
    assert len(server.requests) == 2  # a second question would be answered alike
    # Beside two good sequences it is left out on request, and counted.
    good = [[7, 3, 9, 3, 6], [1, 2]]
    lying(server, lie, only=TOKENS.tolist())
    cache = build(server, [TOKENS, *good], tmp_path / "cache", drop=True)
    assert len(cache) == 2 and cache.manifest.counters == {"dropped_sequences": 1}
    assert TOKENS not in cache


def test_what_is_no_lie(server):
    tokens = np.array([7, 3, 9], np.int32)
    server.answer = lambda body: {
        "choices": [
            {
                "prompt_token_ids": [7, 3, 9],
                "prompt_logprobs": [
                    None,
                    {"3": 9e-4, "44": -math.inf, "60": -9999.0},  # rounding, probability 0
                    {"9": {"logprob": -1, "rank": 3}, "4": {"logprob": -0.4587}},
                ],
            }
        ]
    }
    _, ids, logprobs = teacher(server).score(tokens, LIVE)
    assert ids.tolist() == [[3, 60], [4, 9], [-1, -1]]
    assert logprobs[0].tolist() == [0.0, -9999.0] and logprobs[1, 1] == -1.0
    with pytest.raises(ValueError, match="prompt_token_ids must equal the prompt, got .7, 3, 9"):
        teacher(server).score(np.array([7, 3, 8], np.int32), LIVE)


def test_an_echo_that_lies(server):
    asked = teacher(server, mode="echo")
    rows = {
        "names": ([None, {"the": -1.0}], "row 0: tokens must be named 'token_id:N'.*got 'the'"),
        "ids": ([None, {"3": -1.0}], "row 0: tokens must be named 'token_id:N'"),
        "short": ([None], r"echo must have one element a token \(2\), got 1"),
        "null": ([None, None], "row 0: it must be a mapping"),
        "next": ([None, {"token_id:4": -1.0}], f"row 0: .*{NEXT}"),
        "none": (None, "must hold echo, got none"),
    }
    for found, words in rows.values():
        server.answer = lambda body, found=found: {
            "choices": [{"logprobs": {"top_logprobs": found}}]
        }
        with pytest.raises(ValueError, match=words):
            asked.score(np.array([7, 3], np.int32), LIVE)
    server.answer = lambda body: {"choices": [{"logprobs": None}]}
    with pytest.raises(ValueError, match="must hold echo, got none"):
        asked.score(np.array([7, 3], np.int32), LIVE)


# --- one that fails beside others -----------------------------------------------------------------


def failing(server, bad, fault):
    """Every answer waits until all eight are asked for; ``bad`` fails."""
    gate, truth = threading.Barrier(8, timeout=20), server.answer

    def answer(body):
        gate.wait()
        if body["prompt"] == bad:
            return fault
        time.sleep(0.2)  # the others are under way when it fails
        return truth(body)

    server.answer = answer


FAULTS = {"a lie": {"choices": [{"prompt_logprobs": [None] * 3}]}, "a refusal": 400, "a crash": 500}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_of_eight_that_fails_loses_none_of_the_others(server, tmp_path, fault):
    items = [[i, i + 1, i + 2] for i in range(8)]
    truth = server.answer
    failing(server, items[0], FAULTS[fault])
    with pytest.raises(
        (OSError, ValueError), match=r"sequence \w+ \(3 tokens: 0, 1, 2\).*on_failure"
    ):
        build(server, items, tmp_path / "cache", concurrency=8, retries=0)
    kept = TeacherCache(tmp_path / "cache", partial=True)
    assert len(kept) == 7 and all(tokens in kept for tokens in items[1:])
    # It does not block what comes after it, on request.
    server.answer = lambda body: FAULTS[fault] if body["prompt"] == items[0] else truth(body)
    more = [*items, [9, 10, 11]]
    asked = len(server.requests)
    cache = build(server, more, tmp_path / "cache", retries=0, drop=True)
    assert len(cache) == 8 and len(server.requests) - asked == 2
    assert cache.manifest.counters == {"dropped_sequences": 1}


def test_a_failure_of_the_server_is_no_failure_of_a_sequence(server, tmp_path):
    items = sequences()
    for status in (401, 403, 404, 503):
        server.faults = [status] * 99
        with pytest.raises(OSError, match=f"HTTP {status}") as refused:
            build(server, items, tmp_path / "cache", retries=0, drop=True)
        assert "on_failure" not in str(refused.value)
    server.http.server_close()
    gone = ServerTeacher("http://127.0.0.1:9/v1", "tiny", top_k=5, retries=0, timeout=2)
    with pytest.raises(OSError, match="server unreachable"):
        build_cache_from_server(
            gone, items, tmp_path / "cache", live_vocab=LIVE, on_failure="drop", codec="float32"
        )


@pytest.mark.parametrize("count", [1, 8, 80])
def test_a_server_that_fails_at_everything_is_an_error(server, tmp_path, count):
    lying(server, lambda rows: [None] * len(rows))
    items = [[i % 50, i // 50, 3] for i in range(count)]
    words = f"must score every sequence, got {min(count, 32)} that failed. The first is sequence"
    for drop in (True, False):
        server.requests.clear()
        with pytest.raises(ValueError, match=words):
            build(server, items, tmp_path / "cache", drop=drop)
        assert len(server.requests) <= 40


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_poisoned_sequence_blocks_nothing(server, tmp_path, fault, concurrency):
    items, truth = [[i, i + 1, i + 2] for i in range(12)], server.answer
    bad = [items[0], items[5]]
    server.answer = lambda body: FAULTS[fault] if body["prompt"] in bad else truth(body)
    with pytest.raises((OSError, ValueError), match="got 2 that failed. The first is sequence"):
        build(server, items, tmp_path / "cache", concurrency=concurrency, retries=0)
    kept = TeacherCache(tmp_path / "cache", partial=True)
    assert len(kept) == 10 and not any(tokens in kept for tokens in bad)
    server.answer = truth  # mended: nothing is asked twice, nothing is missing
    server.requests.clear()
    assert len(build(server, items, tmp_path / "cache")) == 12 and len(server.requests) == 2


def test_a_bad_sequence_keeps_what_was_answered(server, tmp_path):
    items = [[1, 2, 3], [2, 3, 4], [60, 61, 1, 1]]  # the longest comes last
    with pytest.raises(ValueError, match="all below live_vocab"):
        build(server, items, tmp_path / "cache")
    assert len(TeacherCache(tmp_path / "cache", partial=True)) == 2
