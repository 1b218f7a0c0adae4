"""The only way into a deployment from outside: what sites need of the SuperLink's interface, and nothing else.

Open-source Flower has no users: whoever reaches a SuperLink can submit code to it and take its tasks. So the SuperLink
listens on the loopback interface, and this passes on requests below /v1/fleet/ (nodes with registered keys, which the
SuperLink checks) and answers all others with 404, before reading them. A reverse proxy such as nginx does the same
(`hocket deploy init` writes its configuration); this one needs nothing but what Flower brings.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import uvicorn

OPEN = "/v1/fleet/"
HOPS = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
"""Headers that belong to one connection."""
LARGEST = 64 << 20  # bytes of one request; Flower cuts arrays into 5 MiB


class Gate:
    """An ASGI app that passes on what is open.

    Args:
        behind: address of the SuperLink, as https://127.0.0.1:18000.
        certificate: of the authority that signed the SuperLink's certificate; none: the SuperLink speaks plain HTTP.
    """

    def __init__(self, behind: str, certificate: Path | None) -> None:
        context = ssl.create_default_context(cafile=str(certificate)) if certificate else True
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        self._client = httpx.AsyncClient(base_url=behind, verify=context, timeout=httpx.Timeout(300.0), limits=limits)

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await self._client.aclose()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http" or not _open(scope):
            await _say(send, 404, b"not found")
            return
        headers = [(k, v) for k, v in scope["headers"] if k.decode().lower() not in HOPS]
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > LARGEST:
            await _say(send, 413, b"too large")
            return
        query = scope["query_string"].decode()
        url = scope["path"] + (f"?{query}" if query else "")
        try:
            request = self._client.build_request(scope["method"], url, headers=headers, content=_body(receive))
            answer = await self._client.send(request, stream=True)
        except _TooLarge:
            await _say(send, 413, b"too large")
            return
        except httpx.HTTPError:
            await _say(send, 502, b"the SuperLink does not answer")
            return
        try:
            back = [(k, v) for k, v in answer.headers.raw if k.decode().lower() not in HOPS]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": back})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()


class _TooLarge(Exception):
    pass


def _open(scope: dict[str, Any]) -> bool:
    """Only plain paths: nothing that another server could read as a way up."""
    path, raw = scope["path"], scope.get("raw_path", b"").split(b"?")[0]
    odd = ".." in path or "//" in path or "\\" in path or b"%" in raw or any(ord(c) < 33 for c in path)
    return path.startswith(OPEN) and not odd


async def _body(receive: Callable[[], Awaitable[Any]]) -> AsyncIterator[bytes]:
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        part = event.get("body", b"")
        size += len(part)
        if size > LARGEST:
            raise _TooLarge
        if part:
            yield part
        if not event.get("more_body"):
            return


async def _say(send: Callable[[Any], Awaitable[None]], status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def serve(
    behind: str, host: str, port: int, certificate: Path | None = None, own: tuple[Path, Path] | None = None
) -> None:
    """Listen until stopped.

    Args:
        certificate: see `Gate`.
        own: (certificate chain, key) that this shows to sites; none: plain HTTP, for tests on one machine.
    """
    tls: dict[str, Any] = {"ssl_certfile": str(own[0]), "ssl_keyfile": str(own[1])} if own else {}
    uvicorn.run(Gate(behind, certificate), host=host, port=port, log_level="warning", access_log=False, **tls)
