"""What stands before every route: the API key, the size of the body, and how long it may take to arrive.

Plain ASGI, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .failure import Failure

BODY_LIMIT = 1 << 20  # bytes
BODY_SECONDS = 30.0
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware.

    keys: any of them opens every route; none at all leaves the server open. opened: routes that need none, a whole
    folder where one ends in a slash. count: called with the status of every answer.
    """

    def __init__(
        self,
        app: Any,
        keys: Sequence[str],
        opened: Sequence[str] = (),
        limit: int = BODY_LIMIT,
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app, self._limit, self._count = app, limit, count
        self._opened = [path for path in opened if path == "/" or not path.endswith("/")]
        self._folders = tuple(path for path in opened if path not in self._opened)
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
        except Failure as failure:
            await _refuse(failure, counted)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), counted)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in self._opened or scope["path"].startswith(self._folders):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        digest = _digest(given[len(b"Bearer ") :] if given[:7].lower() == b"bearer " else b"")
        # Every key is compared, so that the time tells neither how much of one matched nor which.
        if not sum(hmac.compare_digest(digest, key) for key in self._keys):
            raise Failure(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'.", "bad_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of the body, or None where the client went away."""
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_big = Failure(413, f"the body is larger than {self._limit} bytes; send less at once.", "body_too_large")
        if declared.isdigit() and int(declared[:20]) > self._limit:
            raise too_big
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._limit:
                        raise too_big
                    if not message.get("more_body"):
                        return body
        except TimeoutError:
            raise Failure(408, "the body did not arrive in time; send it again.", "timeout") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives `body` first; what comes after it (the client going away) as it comes."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(failure: Failure, send: Send) -> None:
    """Answer and close: the rest of a body that is too large is not read."""
    body = json.dumps(failure.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    if failure.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
