"""One client for models behind servers, on the openai package: answers are not trusted.

The package knows the API; what it does not promise is added here. A redirect is never followed, no
key and no password of an address is in any text that leaves this file, a request ends at its
time-out whatever trickles in, a body is read up to a limit and no further, and only what may pass
is tried again, an answer that cannot be read among it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import ssl
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, TypeVar

from kd.serving.connection import LIMIT, TooLarge, connection

T = TypeVar("T")

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
EXCERPT = 200  # characters of a server's text in a message
ADDRESS_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
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
    """A model behind an OpenAI-compatible server, and how long a request to it is tried.

    Attributes:
        base_url: up to and with /v1, such as "http://localhost:8000/v1"; that of OPENAI_BASE_URL
            when None. "user:password@" in it is sent as basic authorization.
        model: the name the server knows it by.
        key_variable: environment variable that holds the key, never a key itself; read at every
            request. OPENAI_API_KEY need not be set, and is not sent beside a password of the
            address; empty for no key.
        concurrency: requests under way at a time.
        timeout: seconds for one attempt, from connecting to the answer's last byte.
        retries: attempts after the first, for what may pass (429, 5xx, broken connections, what
            cannot be read); one at most after a time-out.
        wait: seconds before the first of them; doubled each time, with jitter. A Retry-After
            header counts when it is longer.
        max_wait: the longest wait.

    Raises:
        ValueError: unless the address is http(s)://host, the key's variable is set and the
            figures make sense.
    """

    base_url: str | None
    model: str
    _: KW_ONLY
    key_variable: str = KEY_VARIABLE
    concurrency: int = 4
    timeout: float = 300.0
    retries: int = 6
    wait: float = 1.0
    max_wait: float = 60.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        address_ok = re.fullmatch(r"https?://[!-~]+", self.address) is not None
        if address_ok:
            try:
                parts = urllib.parse.urlsplit(self.address)
                address_ok = bool(parts.hostname) and parts.port != 0 and not parts.fragment
            except ValueError:  # its text may show a part of the password
                address_ok = False
        if not address_ok:
            raise ValueError(
                f"{name}: base_url must start with http:// or https:// and a host, got "
                f"{shown(self.address)!r}. Write it as http://host:port/v1; signs of a password "
                "are written as %40 and the like."
            )
        if not self.timeout > 0 or self.retries < 0 or self.wait < 0 or self.max_wait < 0:
            raise ValueError(
                f"{name}: timeout must be above 0, and retries and waits at least 0, got "
                f"{self.timeout}, {self.retries}, {self.wait} and {self.max_wait}."
            )
        self.headers()
        if self.concurrency < 1:
            raise ValueError(f"{name}: concurrency must be at least 1, got {self.concurrency}.")
        if self.key_variable not in ("", KEY_VARIABLE) and not self._key():
            raise ValueError(
                f"{name}: key_variable must name a set environment variable, got "
                f"{self.key_variable!r}. Export it first."
            )

    def __repr__(self) -> str:
        """The fields, the address and the key's variable as they may be shown."""
        entries = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "base_url":
                value = shown(self.address)
            if entry.name == "key_variable" and value:
                value = shown_variable(value)
            if entry.repr:
                entries.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(entries)})"

    @property
    def address(self) -> str:
        """``base_url``, or that of OPENAI_BASE_URL."""
        found = self.base_url if self.base_url is not None else os.environ.get(ADDRESS_VARIABLE)
        if not found:
            raise ValueError(
                f"{type(self).__name__}: base_url must be given, or set as {ADDRESS_VARIABLE}, "
                f"got {self.base_url!r}."
            )
        return found

    def ask(
        self,
        call: Callable[[Any], Awaitable[Any]],
        limit: int,
        read: Callable[[Any], T],
        turn: Callable[[], None] = lambda: None,
    ) -> tuple[T, int]:
        """Make a call of the openai package until its answer can be read.

        Args:
            call: takes an ``AsyncOpenAI`` to a raw response of it, such as ``lambda client:
                client.completions.with_raw_response.create(...)``.
            limit: bytes the answer may have.
            read: takes the answer's JSON to what is wanted of it; a ValueError, KeyError,
                IndexError, TypeError or AttributeError of it makes the answer garbage, which is
                asked for again.
            turn: called before every attempt.

        Returns:
            What ``read`` made of the answer, and the number of attempts before it.

        Raises:
            ServerError: when the server refuses for good, or every attempt failed.
            ModuleNotFoundError: the openai package is not installed.
        """
        wait = self.wait
        client, loop = connection(self)
        for attempt in range(self.retries + 1):
            turn()
            found = self._attempt(lambda: call(client), loop, limit, read)
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
            f"{type(self).__name__}: {shown(self.address)} must {rule}, got {failure.reason}: "
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
        if self.key_variable == KEY_VARIABLE and self._userinfo():
            return ""  # the address says how to sign in
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

    def headers(self) -> dict[str, str]:
        """The authorization of a request; empty where there is no key and no password."""
        name, headers = type(self).__name__, dict[str, str]()
        key, userinfo = self._key(), self._userinfo()
        if key and not re.fullmatch(r"[ -~]+", key):
            raise ValueError(
                f"{name}: the key in {shown_variable(self.key_variable)} must be printable "
                "ASCII, got other characters. Copy it again."
            )
        if self.key_variable and shown_variable(self.key_variable) == "***":
            raise ValueError(
                f"{name}: the key must be in an environment variable, got what is no name "
                "of one. Export the key, and pass the variable's name."
            )
        if key and userinfo:
            raise ValueError(
                f"{name}: base_url must hold no user:password@ where {self.key_variable} "
                f"holds a key, got {shown(self.address)!r}. Give one of them."
            )
        if userinfo:
            headers["Authorization"] = f"Basic {base64.b64encode(userinfo.encode()).decode()}"
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    @property
    def bare(self) -> str:
        """The address without password and query, as the openai package sees it and logs it."""
        parts = urllib.parse.urlsplit(self.address)
        host = parts.netloc.rpartition("@")[2]
        return urllib.parse.urlunsplit(parts._replace(netloc=host, query=""))

    def _attempt(
        self,
        call: Callable[[], Awaitable[Any]],
        loop: asyncio.AbstractEventLoop,
        limit: int,
        read: Callable[[Any], T],
    ) -> T | _Failure:
        import openai

        async def answered() -> Any:
            LIMIT.set(limit)
            return await asyncio.wait_for(call(), self.timeout)

        try:
            found = asyncio.run_coroutine_threadsafe(answered(), loop).result()
            response = found.http_response
        except openai.APIStatusError as error:
            response = error.response
        except (asyncio.TimeoutError, TimeoutError):
            return self._failure("timed out", f"no whole answer within {self.timeout:g} s", most=1)
        except TooLarge:
            rule = f"an answer to this request has at most {limit:,} bytes"
            return self._failure("answer too large", rule, most=0)
        except (openai.APIConnectionError, OSError) as error:
            return self._broken(error)
        text = response.content.decode("utf-8", "replace")
        if response.status_code != 200:
            return self._refusal(response.status_code, response.headers, text)
        try:
            return read(json.loads(self.redact(text, CERTAIN_SECRET)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}; {self._excerpt(text)}"
            return self._failure("garbage from the server", said)

    def _broken(self, error: BaseException) -> _Failure:
        """Why there is no whole answer: the first cause, which the packages between wrap."""
        while (below := error.__cause__ or error.__context__) is not None:
            error = below
        most = 0 if isinstance(error, ssl.SSLCertVerificationError) else MANY
        return self._failure("server unreachable", f"{type(error).__name__}: {error}", most)

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
