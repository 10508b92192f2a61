"""One HTTP client for models behind servers: JSON in, JSON out, and no trust in the other side.

A redirect is never followed, no key and no password of an address is in any text that leaves this
file, a request ends at its time-out whatever trickles in, a body is read up to a limit and no
further, and only what may pass is tried again.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
EXCERPT = 200  # characters of a server's text in a message
ERROR_BODY = 1 << 16
MANY = 10**9
# A secret that long is no word of anybody's text: it is taken out of the answers themselves.
CERTAIN_SECRET = 12


class ServerError(OSError):
    """A request that failed for good.

    Attributes:
        reason: a fixed phrase that reports count by: "HTTP 500", "server unreachable", "timed
            out", "redirected", "answer too large" or "garbage from the server".
        detail: what was special about this one; without keys and passwords.
    """

    def __init__(self, reason: str, detail: str = "", message: str = "") -> None:
        super().__init__(message or (f"{reason}: {detail}" if detail else reason))
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class _Failure:
    reason: str
    detail: str
    most: int  # further attempts that are worth it
    after: float  # seconds, as the server asks


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Where requests go, what goes with them, and how long one is tried.

    Attributes:
        owner: the class that users know, for messages.
        name: what its field for the address is called, for messages.
        address: up to and with /v1; "user:password@" in it is sent as basic authorization.
        key_variable: environment variable that holds the key, read at every request.
        timeout: seconds for one attempt, from connecting to the answer's last byte.
        retries: attempts after the first, for what may pass; one at most after a time-out.
        wait: seconds before the first of them; doubled each time, with jitter. A Retry-After
            header counts when it is longer.
        max_wait: the longest wait.

    Raises:
        ValueError: unless the address is http(s)://host and the figures make sense.
    """

    owner: str
    name: str
    address: str
    key_variable: str = ""
    timeout: float = 300.0
    retries: int = 6
    wait: float = 1.0
    max_wait: float = 60.0

    def __post_init__(self) -> None:
        address_ok = re.fullmatch(r"https?://[!-~]+", str(self.address)) is not None
        if address_ok:
            try:
                parts = urllib.parse.urlsplit(self.address)
                address_ok = bool(parts.hostname) and parts.port != 0 and not parts.fragment
            except ValueError:  # its text may show a part of the password
                address_ok = False
        if not address_ok:
            raise ValueError(
                f"{self.owner}: {self.name} must start with http:// or https:// and a host, got "
                f"{shown(self.address)!r}. Write it as http://host:port/v1; signs of a password "
                "are written as %40 and the like."
            )
        if not self.timeout > 0 or self.retries < 0 or self.wait < 0 or self.max_wait < 0:
            raise ValueError(
                f"{self.owner}: timeout must be above 0, and retries and waits at least 0, got "
                f"{self.timeout}, {self.retries}, {self.wait} and {self.max_wait}."
            )
        self._headers()

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        limit: int,
        read: Callable[[Any], T],
        turn: Callable[[], None] = lambda: None,
    ) -> tuple[T, int]:
        """POST JSON below the address until an answer can be read.

        Args:
            path: such as "/completions".
            body: the request.
            limit: bytes the answer may have.
            read: takes the answer's JSON to what is wanted of it; a ValueError, KeyError,
                IndexError, TypeError or AttributeError of it makes the answer garbage, which is
                asked for again.
            turn: called before every attempt.

        Returns:
            What ``read`` made of the answer, and the number of attempts before it.

        Raises:
            ServerError: when the server refuses for good, or every attempt failed.
        """
        data, wait = json.dumps(body).encode(), self.wait
        for attempt in range(self.retries + 1):
            turn()
            found = self._attempt(path, data, limit, read)
            if not isinstance(found, _Failure):
                return found, attempt
            failure = found
            if attempt >= min(self.retries, failure.most):
                break
            jittered = wait * random.uniform(0.5, 1.0)
            time.sleep(min(max(failure.after, jittered), self.max_wait))
            wait = 2 * wait
        rule = f"answer within {attempt + 1} attempts" if failure.most else "accept the request"
        raise ServerError(
            failure.reason,
            failure.detail,
            f"{self.owner}: {shown(self.address)} must {rule}, got {failure.reason}: "
            f"{failure.detail}.",
        )

    def redact(self, text: str, shortest: int = 1) -> str:
        """The text with *** for the key and the address's passwords, however they are written."""
        secrets = [secret for secret in self._secrets() if len(secret) >= shortest]
        for secret in sorted(secrets, key=len, reverse=True):
            if secret in text:
                # A short one is a part of other words.
                whole = r"(?<!\w){}(?!\w)" if len(secret) < 4 else "{}"
                text = re.sub(whole.format(re.escape(secret)), "***", text)
        return text

    def _key(self) -> str:
        return (os.environ.get(self.key_variable) or "").strip() if self.key_variable else ""

    def _secrets(self) -> set[str]:
        parts = urllib.parse.urlsplit(self.address)
        plain = {self._key(), parts.password or ("" if parts.password else parts.username) or ""}
        if parts.username is not None:
            plain |= {self._userinfo(), base64.b64encode(self._userinfo().encode()).decode()}
        plain |= {value for _, value in urllib.parse.parse_qsl(parts.query)}
        unquoted = {urllib.parse.unquote(text) for text in plain}
        quoted = {urllib.parse.quote(text, safe="") for text in unquoted}
        return {text for text in plain | unquoted | quoted if text}

    def _userinfo(self) -> str:
        userinfo = urllib.parse.urlsplit(self.address).netloc.rpartition("@")[0]
        return urllib.parse.unquote(userinfo)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        key, userinfo = self._key(), self._userinfo()
        if key and not re.fullmatch(r"[ -~]+", key):
            raise ValueError(
                f"{self.owner}: the key in {shown_variable(self.key_variable)} must be printable "
                "ASCII, got other characters. Copy it again."
            )
        if self.key_variable and shown_variable(self.key_variable) == "***":
            raise ValueError(
                f"{self.owner}: the key must be in an environment variable, got what is no name "
                "of one. Export the key, and pass the variable's name."
            )
        if key and userinfo:
            raise ValueError(
                f"{self.owner}: {self.name} must hold no user:password@ where {self.key_variable} "
                f"holds a key, got {shown(self.address)!r}. Give one of them."
            )
        if userinfo:
            headers["Authorization"] = f"Basic {base64.b64encode(userinfo.encode()).decode()}"
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _url(self, path: str) -> str:
        parts = urllib.parse.urlsplit(self.address)
        host = parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=host, path=parts.path.rstrip("/") + path)
        return urllib.parse.urlunsplit(url)

    def _attempt(
        self, path: str, data: bytes, limit: int, read: Callable[[Any], T]
    ) -> T | _Failure:
        request = urllib.request.Request(self._url(path), data, self._headers(), method="POST")
        try:
            with _deadline(self.timeout) as watch, _open(request, watch, self.timeout) as response:
                status, headers = response.status, response.headers
                body = _bounded(response, limit if status == 200 else ERROR_BODY)
                if body is None and status == 200:
                    rule = f"an answer to this request has at most {limit:,} bytes"
                    return self._failure("answer too large", rule, most=0)
        except TimeoutError:
            return self._failure("timed out", f"no whole answer within {self.timeout:g} s", most=1)
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # urllib wraps what failed to connect
            if isinstance(cause, TimeoutError):
                return self._failure(
                    "timed out", f"no connection within {self.timeout:g} s", most=1
                )
            most = 0 if isinstance(cause, ssl.SSLCertVerificationError) else MANY
            return self._failure("server unreachable", f"{type(cause).__name__}: {cause}", most)
        text = (body or b"").decode("utf-8", "replace")
        if status != 200:
            return self._refusal(status, headers, text)
        try:
            return read(json.loads(self.redact(text, CERTAIN_SECRET)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}; {self._excerpt(text)}"
            return self._failure("garbage from the server", said)

    def _failure(self, reason: str, detail: str, most: int = MANY, after: float = 0.0) -> _Failure:
        return _Failure(reason, self.redact(detail)[: 3 * EXCERPT], most, after)

    def _refusal(self, status: int, headers: Any, text: str) -> _Failure:
        if 300 <= status < 400:
            target = shown(headers.get("Location") or "nowhere")
            rule = f"HTTP {status} to {target} is not followed, the key would go with it"
            return self._failure("redirected", f"{rule}. Give the final address", most=0)
        asked = (headers.get("Retry-After") or "").strip()
        after = float(asked) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", asked) else 0.0
        # An account without money stays without money.
        passes = status in AGAIN and "insufficient_quota" not in text
        return self._failure(f"HTTP {status}", self._excerpt(text), MANY if passes else 0, after)

    def _excerpt(self, text: str) -> str:
        """The beginning; redacted before it is cut, so that no part of a key is left."""
        return self.redact(text)[:EXCERPT]


def shown(address: Any) -> str:
    """An address without what is secret in it: "user:password@" and the values of its query."""
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)?.*@", r"\1***@", str(address), flags=re.DOTALL)
    return re.sub(r"([?#]).*", r"\1***", text, flags=re.DOTALL)


def shown_variable(name: str) -> str:
    """An environment variable's name; *** for what looks like the key itself."""
    return name if name in os.environ or re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) else "***"


def shown_fields(instance: Any, address: str, variable: str) -> str:
    """A dataclass's repr with its address and variable as they may be shown."""
    entries = []
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        if entry.repr:
            value = shown(value) if entry.name == address else value
            value = shown_variable(value) if entry.name == variable and value else value
            entries.append(f"{entry.name}={value!r}")
    return f"{type(instance).__name__}({', '.join(entries)})"


# --- the connection -------------------------------------------------------------------------------


class _Watch:
    """Shuts the socket of a request down when its time is over."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.expired = False

    def expire(self) -> None:
        self.expired = True
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it ended by itself just now
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[_Watch]:
    """Whatever happens inside, after so many seconds it fails, and with a TimeoutError."""
    watch = _Watch()
    timer = threading.Timer(seconds, watch.expire)
    timer.daemon = True
    timer.start()
    try:
        yield watch
    except (OSError, ValueError, http.client.HTTPException):
        if not watch.expired:
            raise
    finally:
        timer.cancel()
    if watch.expired:
        raise TimeoutError


def _open(request: urllib.request.Request, watch: _Watch, seconds: float) -> Any:
    """The response, of any status: this opener knows no redirects, cookies or passwords."""

    def watched(kind: type[http.client.HTTPConnection]) -> Any:
        class Connection(kind):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                watch.socket = self.sock
                if watch.expired:
                    raise TimeoutError

        return Connection

    class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(watched(http.client.HTTPConnection), request)

        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(watched(http.client.HTTPSConnection), request)

    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(Handler())
    return opener.open(request, timeout=seconds)


def _bounded(response: Any, limit: int) -> bytes | None:
    """The body; None when it is longer than the limit, and then no more of it is read."""
    parts, size = [], 0
    while part := response.read(1 << 16):
        parts.append(part)
        size += len(part)
        if size > limit:
            return None
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)
