"""The connection below the openai package: what is secret goes in last, what comes is bounded."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import threading
import urllib.parse
import urllib.request
from typing import Any, Protocol

ERROR_BODY = 1 << 16  # bytes read of a refusal
# Bytes that the answer to the request under way may have.
LIMIT: contextvars.ContextVar[int] = contextvars.ContextVar("LIMIT", default=ERROR_BODY)

MAKING = threading.Lock()


class TooLarge(Exception):
    """A body is longer than its limit."""


class Addressed(Protocol):
    """What is needed of a ``kd.serving.Endpoint``; hashable."""

    @property
    def address(self) -> str: ...

    @property
    def bare(self) -> str: ...

    def headers(self) -> dict[str, str]: ...

    def __hash__(self) -> int: ...


def connection(endpoint: Addressed) -> tuple[Any, asyncio.AbstractEventLoop]:
    """An ``AsyncOpenAI`` for an endpoint, and the event loop that its requests run in.

    Raises:
        ModuleNotFoundError: the openai package is not installed.
    """
    with MAKING:  # of several threads that begin together, one makes them
        return _client(endpoint, os.getpid()), _loop(os.getpid())


@functools.lru_cache(maxsize=4)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all requests of a process, in a thread: callers may have loops of their
    own, as notebooks do."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="kd-serving", daemon=True).start()
    return loop


@functools.lru_cache(maxsize=64)
def _client(endpoint: Addressed, process: int) -> Any:
    """An ``AsyncOpenAI`` that sends what the endpoint says, and reads no more than it may."""
    try:
        import httpx2
        import openai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{type(endpoint).__name__} asks servers through the openai package: pip install "
            "'kd-llm[serve]'",
            name=error.name,
        ) from None

    class Transport(httpx2.AsyncBaseTransport):
        """Adds what is secret to a request where nothing logs it any more; bounds its answer."""

        def __init__(self) -> None:
            parts = urllib.parse.urlsplit(endpoint.bare)
            proxies = urllib.request.getproxies()
            found = proxies.get(parts.scheme) or proxies.get("all")
            direct = found is None or urllib.request.proxy_bypass(parts.hostname or "")
            # No connection is kept: one that the server closes meanwhile would be a failure.
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            proxy = None if direct else found
            self.inner = httpx2.AsyncHTTPTransport(limits=limits, proxy=proxy)

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            headers = request.headers.copy()
            del headers["Authorization"]
            headers.update(endpoint.headers())
            # Nothing is unpacked: a small body could become a large one.
            headers["Accept-Encoding"] = "identity"
            query = urllib.parse.urlsplit(endpoint.address).query
            url = request.url.copy_with(query=query.encode()) if query else request.url
            sent = httpx2.Request(
                request.method,
                url,
                headers=headers,
                stream=request.stream,
                extensions=request.extensions,
            )
            response = await self.inner.handle_async_request(sent)
            try:
                body = await _bounded(response)
            finally:
                await response.aclose()
            kept = {
                name: value
                for name, value in response.headers.items()
                if name in ("content-type", "location", "retry-after")
            }
            return httpx2.Response(response.status_code, headers=kept, content=body)

    return openai.AsyncOpenAI(
        base_url=endpoint.bare,
        api_key="in the transport",
        max_retries=0,  # the endpoint tries again, also after what cannot be read
        timeout=None,  # the endpoint has one for the whole request
        http_client=httpx2.AsyncClient(transport=Transport(), follow_redirects=False),
    )


async def _bounded(response: Any) -> bytes:
    """The body; of a refusal its beginning."""
    limit = LIMIT.get() if response.status_code == 200 else ERROR_BODY
    parts, size = [], 0
    async for part in response.stream:
        parts.append(part)
        size += len(part)
        if size > limit and response.status_code == 200:
            raise TooLarge
        if size > limit:
            break
    return b"".join(parts)
