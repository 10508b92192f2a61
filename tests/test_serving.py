"""The HTTP client against raw sockets that redirect, echo, trickle and never end."""

import base64
import json
import socket
import threading
import time
import traceback

import numpy as np
import pytest

from kd.serving import Endpoint, ServerError, shown
from kd.teachers import ServerTeacher
from kd.traces.server import Server

KEY = "sk-0123456789abcdefghij"


class Raw:
    """Answers every connection with ``answer(connection)``, after its request was read."""

    def __init__(self, answer):
        self.answer, self.requests, self.sent, self.open = answer, [], 0, True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection):
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            self.requests.append(request)
            try:
                for part in self.answer():
                    if not self.open:
                        return
                    connection.sendall(part)
                    self.sent += len(part)
            except OSError:
                return  # the client went away

    def close(self):
        self.open = False
        self.listener.close()


@pytest.fixture
def raw():
    made = []

    def make(*parts):
        answer = parts[0] if callable(parts[0]) else lambda: parts
        made.append(Raw(answer))
        return made[-1]

    yield make
    for server in made:
        server.close()


def http(body, status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def teacher(host, **options):
    settings = {"key_variable": "KD_KEY", "retries": 2, "wait": 0, "timeout": 20, **options}
    made = ServerTeacher(f"http://{host}/v1", "m", **settings)
    return made, lambda: made.score(np.array([1, 2, 3], np.int32))


def chat(host, **options):
    settings = {"key_variable": "KD_KEY", "retries": 2, "wait": 0, "timeout": 20, **options}
    made = Server(f"http://{host}/v1", "m", **settings)
    return made, lambda: made.chat([{"role": "user", "content": "2+2?"}], max_tokens=8)


@pytest.fixture(params=[teacher, chat])
def client(request, monkeypatch):
    monkeypatch.setenv("KD_KEY", KEY)
    return request.param


def everything(error, local=False):
    """All texts of an error: messages, arguments, what it was raised from, traceback, locals."""
    texts, seen = [], error
    while seen is not None:
        texts += [str(seen), repr(seen), repr(seen.args), repr(vars(seen))]
        seen = seen.__cause__ or seen.__context__
    lines = traceback.TracebackException.from_exception(error, capture_locals=local).format()
    return "\n".join([*texts, *(line for line in lines if "test_serving.py" not in line)])


def failure(ask):
    with pytest.raises((OSError, ValueError)) as found:
        ask()
    return found.value


# --- redirects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["http://{other}/v1/x", "//{other}/v1", "/v2", "http://{self}/"])
def test_no_redirect_is_followed(raw, client, status, where):
    other = raw(http(b"{}"))
    server = raw(lambda: [http(b"", f"{status} Moved", f"Location: {target}")])
    target = where.format(other=other.host, self=server.host)
    error = failure(client(server.host)[1])
    assert f"must accept the request, got redirected: HTTP {status} to" in str(error)
    assert "not followed" in str(error) and KEY not in everything(error)
    assert len(server.requests) == 1 and not other.requests
    assert f"Bearer {KEY}".encode() in server.requests[0]


def test_a_redirect_without_a_target_and_one_that_shows_the_key(raw, client):
    for headers in ((), (f"Location: http://u:{KEY}@h/?key={KEY}#{KEY}",)):
        error = failure(client(raw(http(b"", "307 Moved", *headers)).host)[1])
        assert "redirected" in str(error) and KEY not in everything(error)


# --- secrets --------------------------------------------------------------------------------------

ECHOES = {
    "refusal": http(b'{"error": "bad key ' + KEY.encode() + b'"}', "401 No"),
    "retried": http(b"Bearer " + KEY.encode(), "500 No"),
    "at the cut": http(b"x" * 190 + KEY.encode(), "403 No"),
    "garbage": http(b"<html>" + KEY.encode()),
    "no fields": http(json.dumps({"key": KEY}).encode()),
    "a value": http(json.dumps({"choices": KEY}).encode()),
    "status line": f"{KEY} is what you sent\r\n\r\n".encode(),
    "reason phrase": http(b"no", f"401 {KEY}"),
    "retry header": http(b"no", "429 No", f"Retry-After: {KEY}"),
    "chunk size": f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}\r\n".encode(),
    "quoted": http(b'{"error": "sk%2D0123456789abcdefghij sk-0123456789abcdefghij"}', "400 No"),
    "rows": http(
        json.dumps({"choices": [{"prompt_logprobs": [None, {KEY: -1.0}, {KEY: KEY}]}]}).encode()
    ),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_a_server_that_echoes_the_key(raw, client, echo):
    error = failure(client(raw(ECHOES[echo]).host)[1])
    texts = everything(error, local=True)
    assert KEY not in texts and KEY[:6] not in texts


@pytest.mark.parametrize(
    "choices",
    ["{}", [{"prompt_logprobs": [None, {"{}": -1.0}, {"3": -1.0}]}],
     [{"prompt_logprobs": [None, {"2": "{}"}, {"3": -1.0}]}],
     [{"prompt_logprobs": [None, "{}", {"3": -1.0}]}],
     [{"prompt_token_ids": "{}", "prompt_logprobs": [None]}]],
)  # fmt: skip
def test_a_short_key_in_the_rows_of_an_answer(raw, monkeypatch, choices):
    monkeypatch.setenv("KD_KEY", "s3cret")
    answer = json.dumps({"choices": choices}).replace("{}", "s3cret")
    error = failure(teacher(raw(http(answer.encode())).host)[1])
    assert "***" in str(error) and "s3cret" not in everything(error)


def test_a_key_in_an_answer_is_taken_out_of_it(raw, monkeypatch):
    monkeypatch.setenv("KD_KEY", KEY)
    said = {"content": f"your key is {KEY}", "reasoning": KEY}
    answer = {"choices": [{"message": said, "finish_reason": KEY}], "usage": {KEY: KEY}}
    made, ask = chat(raw(http(json.dumps(answer).encode())).host)
    found = ask()
    assert found["message"]["content"] == "your key is ***" and KEY not in str(found)


def test_a_short_key_garbles_nothing(raw, monkeypatch):
    monkeypatch.setenv("KD_KEY", "x")
    answer = {"choices": [{"message": {"content": "x + 1 = exact"}}]}
    assert chat(raw(http(json.dumps(answer).encode())).host)[1]()["message"]["content"] == (
        "x + 1 = exact"
    )
    error = failure(chat(raw(http(b"the example x is bad", "400 No")).host)[1])
    assert error.detail == "the example *** is bad"


@pytest.mark.parametrize(
    ("userinfo", "password"),
    [
        ("user:s3cret", "s3cret"),
        ("user:s3%20c%40ret", "s3 c@ret"),
        ("s3cret-token", "s3cret-token"),
        (":s3cret", "s3cret"),
    ],
)
def test_a_password_in_the_address_is_sent_and_never_shown(raw, client, userinfo, password):
    def said():
        sent = server.requests[-1].decode().partition("Authorization: ")[2].splitlines()[0]
        return [http(f"you sent {sent} for {userinfo}: {password}".encode(), "401 No")]

    server = raw(said)
    made, ask = client(f"{userinfo}@{server.host}", key_variable="")
    error = failure(ask)
    sent = server.requests[0].decode().partition("Authorization: Basic ")[2].splitlines()[0]
    assert base64.b64decode(sent).decode().endswith(password)
    for secret in (userinfo, password, sent):
        assert secret not in everything(error) + repr(made) + str(made)
    assert server.host in repr(made) and server.host in str(error)


@pytest.mark.parametrize(
    "address",
    [
        "user:s3cret@host:80/v1",
        "http://user:s3cret/x@host/v1",
        "http://user:s3cret#x@host/v1",
        "http://user:s3cret@host:port/v1",
        "http://user:s3cret @host/v1",
        "http://user:s3cret\n@host/v1",
        "ftp://user:s3cret@host",
        "http://?key=s3cret",
    ],
)
def test_an_address_that_is_refused_is_not_shown_with_its_password(address):
    for make in (lambda: ServerTeacher(address, "m"), lambda: Server(address, "m")):
        error = failure(make)
        assert "must start with http:// or https:// and a host" in str(error)
        assert "s3cret" not in everything(error)


def test_a_query_goes_along_and_is_not_shown(raw, client):
    server = raw(http(b"no token s3cret-query", "401 No"))
    made, _ = client(server.host)
    made = type(made)(f"http://{server.host}/v1?token=s3cret-query", "m")
    ask = made.chat if client is chat else made.score
    error = failure(lambda: ask([{"role": "user", "content": "a"}] if client is chat else [1, 2]))
    assert b"?token=s3cret-query HTTP" in server.requests[0].splitlines()[0]
    assert "s3cret" not in everything(error) + repr(made)


def test_a_key_that_is_no_header_or_no_variable(monkeypatch):
    for bad in ("sk-schlüssel-0123", "sk-a\nHost: evil", "sk-a\x00b"):
        if "\x00" not in bad:
            monkeypatch.setenv("KD_KEY", bad)
            for make in (teacher, chat):
                error = failure(lambda make=make: make("host"))
                assert "must be printable ASCII" in str(error)
                assert bad[:8] not in everything(error)
    monkeypatch.setenv("KD_KEY", f"{KEY}\n")  # read from a file, with its line's end
    assert Endpoint("http://h", "m", key_variable="KD_KEY").headers()["Authorization"] == (
        f"Bearer {KEY}"
    )
    for make in (
        lambda: ServerTeacher("http://h", "m", key_variable=KEY),
        lambda: Server("http://h", "m", key_variable=KEY),
    ):
        error = failure(make)
        assert "environment variable" in str(error) and KEY not in everything(error)
    with pytest.raises(ValueError, match=r"no user:password@ where KD_KEY .* '?http://\*\*\*@h"):
        Server("http://a:s3cret@h", "m", key_variable="KD_KEY")


def test_shown():
    assert shown("http://a:b@c@h:1/v1?x=1&y#z") == "http://***@h:1/v1?***"
    assert shown("a:b@h/v1") == "***@h/v1" and shown("http://h:1/v1") == "http://h:1/v1"


def test_no_log_has_a_key_a_password_or_a_query(raw, client, caplog):
    server = raw(http(b"no", "401 No"))
    caplog.set_level(0)  # of every package, everything
    failure(client(server.host)[1])
    failure(client(f"user:s3cret-word@{server.host}", key_variable="")[1])
    made, _ = client(server.host)
    made = type(made)(f"http://{server.host}/v1?token=s3cret-query", "m")
    failure(lambda: (made.chat if client is chat else made.score)([] if client is chat else [1]))
    assert len(server.requests) == 3 and "HTTP Request" in caplog.text
    for secret in (KEY, "s3cret-word", base64.b64encode(b"user:s3cret-word").decode(), "query"):
        assert secret not in caplog.text


# --- the variables of the openai package ----------------------------------------------------------

ANSWER = http(json.dumps({"choices": [{"message": {"content": "4"}}]}).encode())
ASKED = [{"role": "user", "content": "2+2?"}]


def test_address_and_key_come_from_the_variables_that_openai_knows(raw, monkeypatch):
    server = raw(ANSWER)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{server.host}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Server(None, "m").chat(ASKED)["message"]["content"] == "4"
    failure(lambda: ServerTeacher(None, "m").score(np.array([1, 2], np.int32)))
    assert len(server.requests) == 2
    for request, path in zip(server.requests, ("chat/completions", "completions"), strict=True):
        assert request.startswith(f"POST /v1/{path} HTTP".encode())
        assert f"Authorization: Bearer {KEY}\r\n".encode() in request
    Server(None, "m", key_variable="").chat(ASKED)
    Server(f"http://u:pass@{server.host}/v1", "m").chat(ASKED)  # says itself how to sign in
    monkeypatch.delenv("OPENAI_API_KEY")
    Server(None, "m").chat(ASKED)
    signed = [b"authorization" in request.lower() for request in server.requests[2:]]
    assert signed == [False, True, False] and KEY.encode() not in b"".join(server.requests[2:])
    assert b"Basic dTpwYXNz" in server.requests[3]
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(ValueError, match="base_url must be given, or set as OPENAI_BASE_URL"):
        Server(None, "m")


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kd-llm\[serve\]'"):
        Server("http://host-of-nobody/v1", "m").chat(ASKED)


def test_a_caller_with_an_event_loop_can_ask(raw):
    import asyncio

    server = Server(f"http://{raw(ANSWER).host}/v1", "m")

    async def both():
        return server.chat(ASKED), await server.chat_async(ASKED)

    assert [found["message"]["content"] for found in asyncio.run(both())] == ["4", "4"]


def test_a_proxy_of_the_environment_is_used_unless_the_host_is_exempt(raw, monkeypatch):
    proxy, server = raw(ANSWER), raw(ANSWER)
    monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
    monkeypatch.setenv("no_proxy", "nothing.example")
    assert Server("http://model.example/v1", "m").chat(ASKED)["message"]["content"] == "4"
    assert proxy.requests[0].startswith(b"POST http://model.example/v1/chat/completions")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server(f"http://{server.host}/v1", "m").chat(ASKED)
    assert len(proxy.requests) == 1 and len(server.requests) == 1


def test_half_a_character_is_sent_as_a_question_mark(raw):
    bodies = []

    class Reading(Raw):
        def one(self, connection):
            with connection:
                request = b""
                while not request.endswith(b"}"):
                    request += connection.recv(1 << 16)
                bodies.append(request)
                connection.sendall(ANSWER)

    server = Reading(None)
    Server(f"http://{server.host}/v1", "m").chat([{"role": "user", "content": "a\ud83d"}])
    server.close()
    assert b'"content":"a?"' in bodies[0]


# --- time and size --------------------------------------------------------------------------------


def slowly(head, piece):
    def parts():
        yield head
        while True:
            time.sleep(0.02)
            yield piece

    return parts


SLOW = {
    "body": slowly(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
    "body to the end": slowly(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "chunks": slowly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers": slowly(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "one header": slowly(b"HTTP/1.1 200 OK\r\nA: ", b"b"),
    "status line": slowly(b"HT", b"T"),
    "continue": slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a refusal": slowly(b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n", b" "),
    "nothing": slowly(b"", b""),
}


@pytest.mark.parametrize("slow", SLOW)
def test_a_trickling_server_has_its_time_and_no_more(raw, client, slow):
    server, start = raw(SLOW[slow]), time.monotonic()
    error = failure(client(server.host, timeout=0.3, retries=5)[1])
    assert time.monotonic() - start < 5 and error.reason == "timed out"
    assert "must answer within 2 attempts, got timed out: no whole answer within 0.3 s" in str(
        error
    )
    assert len(server.requests) <= 2  # once more, not five times; the second may come too late


def test_a_server_that_reads_nothing(client):
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        ask = client(f"127.0.0.1:{listener.getsockname()[1]}", timeout=0.3, retries=0)[1]
        assert failure(ask).reason == "timed out"


def endless(head, piece):
    def parts():
        yield head
        while True:
            yield piece

    return parts


LONG = {
    "said": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n", b" " * 65536),
    "unsaid": endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536),
    "chunks": endless(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"10000\r\n" + b" " * 65536 + b"\r\n",
    ),
}


@pytest.mark.parametrize("long", LONG)
def test_a_body_is_read_up_to_what_the_request_can_need(raw, client, long):
    server = raw(LONG[long])
    error = failure(client(server.host)[1])
    assert error.reason == "answer too large" and len(server.requests) == 1
    assert "an answer to this request has at most " in str(error)
    time.sleep(0.1)
    assert server.sent < 32 << 20  # what lies in buffers, of what never ends


def test_a_packed_body_is_not_unpacked(raw, client):
    import gzip

    bomb = gzip.compress(b" " * (1 << 26))  # 64 MiB in 64 kB
    server = raw(http(bomb, "200 OK", "Content-Encoding: gzip"))
    error = failure(client(server.host, retries=0)[1])
    assert b"accept-encoding: identity" in server.requests[0].lower()
    assert error.reason in ("garbage from the server", "answer too large")


def test_the_body_of_a_refusal_is_bounded_too(raw, client):
    server = raw(endless(b"HTTP/1.1 400 No\r\n\r\n", b"no " * 20_000))
    assert failure(client(server.host)[1]).reason == "HTTP 400"
    time.sleep(0.1)
    assert server.sent < 32 << 20


@pytest.mark.parametrize(
    "body",
    [b"[" * 50_000, b'{"a": ' + b"9" * 5_000 + b"}", b"\xff\xfe", b"", b"null", b"[]", b'"a"'],
)
def test_what_cannot_be_read_is_garbage(raw, client, body):
    assert isinstance(failure(client(raw(http(body)).host)[1]), (ServerError, ValueError))


# --- trying again ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "attempts"),
    [
        (http(b"", "400 No"), 1),
        (http(b"", "401 No"), 1),
        (http(b"", "404 No"), 1),
        (http(b"", "501 No"), 1),
        (http(b"", "204 No"), 1),
        (http(b'{"error": {"code": "insufficient_quota"}}', "429 No"), 1),
        (http(b"", "429 No", "Retry-After: 0"), 3),
        (http(b"", "503 No", "Retry-After: nan"), 3),
        (http(b"", "529 No", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"), 3),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", 3),
        (b"", 3),
    ],
)
def test_only_what_may_pass_is_tried_again(raw, client, answer, attempts):
    server = raw(answer)
    assert isinstance(failure(client(server.host)[1]), ServerError)
    assert len(server.requests) == attempts


def test_a_retry_after_is_obeyed_up_to_the_longest_wait(raw, monkeypatch):
    monkeypatch.setenv("KD_KEY", KEY)
    waits = []
    monkeypatch.setattr("kd.serving.time.sleep", waits.append)
    server = raw(http(b"", "503 No", "Retry-After: 7"))
    failure(teacher(server.host, wait=1, max_wait=5)[1])
    failure(teacher(server.host, wait=1)[1])
    assert waits == [5, 5, 7, 7]


def test_an_untrusted_certificate_is_not_tried_again(monkeypatch):
    import ssl

    import httpx2

    tries = []

    async def connect(self, request):
        tries.append(request)
        try:
            raise ssl.SSLCertVerificationError("self-signed certificate")
        except ssl.SSLError as error:
            raise httpx2.ConnectError(str(error)) from error

    monkeypatch.setattr("httpx2.AsyncHTTPTransport.handle_async_request", connect)
    error = failure(lambda: Server("https://h/v1", "m").chat([]))
    assert error.reason == "server unreachable" and len(tries) == 1


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}, {"wait": -1}]
)
def test_bad_figures(options):
    with pytest.raises(ValueError, match="timeout must be above 0, and retries and waits"):
        Endpoint("http://h", "m", **options)
