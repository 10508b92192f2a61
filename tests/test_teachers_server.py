"""A server teacher against a real HTTP server that answers as vLLM documents."""

import http.server
import json
import threading

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
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
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
    settings = {"top_k": 5, "backoff": 0.01, "max_wait": 0.05, "timeout": 20, "concurrency": 2}
    return ServerTeacher(server.url, "tiny", **{**settings, **options})


def sequences(count=8):
    return [item for item in cases.texts(3 * count, longest=12) if len(item) > 1][:count]


def build(server, items, path, codec="float32", **options):
    return build_cache_from_server(
        teacher(server, **options), items, path, live_vocab=LIVE, codec=codec, progress=False
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
    asked = teacher(server, api_key_env="SOME_KEY")
    server.faults = [401]
    with pytest.raises(OSError) as refused:
        asked.score(np.array([1, 2, 3], np.int32))
    assert server.keys == ["Bearer s3cret"]
    assert "s3cret" not in str(refused.value) and "s3cret" not in repr(asked)
    build(server, sequences(1), tmp_path / "cache", api_key_env="SOME_KEY")
    for item in (tmp_path / "cache").iterdir():
        assert b"s3cret" not in item.read_bytes()


def test_requests_are_spaced(server):
    asked = teacher(server, requests_per_minute=600)
    import time

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
    ):
        server.answer = lambda body, answer=answer: answer
        with pytest.raises(ValueError, match=words):
            asked.score(tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"top_k": 0}, "top_k must be from 1"), ({"mode": "chat"}, "mode must be one of")],
)
def test_bad_settings(server, options, words):
    with pytest.raises(ValueError, match=words):
        teacher(server, **options)
    with pytest.raises(ValueError, match="base_url must start with http"):
        ServerTeacher("localhost:8000", "tiny")
    with pytest.raises(ValueError, match="live_vocab or tokenizer must be given"):
        build_cache_from_server(teacher(server), [], "unused")
