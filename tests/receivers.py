"""A receiver of callbacks and webhooks on loopback that verifies, remembers and misbehaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from standardwebhooks.webhooks import Webhook

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A message as it came, and the status that it was answered with (0: none was)."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def told(self) -> Json:
        return json.loads(self.body)

    def verify(self, secret: str) -> None:
        """As a receiver would, by the reference implementation."""
        Webhook(secret).verify(self.body, self.headers)


#: What a receiver answers: a status and headers; None hangs.
Reply = tuple[int, dict[str, str]] | None
Behaviour = Callable[["Request"], Awaitable[Reply]]


@dataclass(slots=True, kw_only=True)
class Receiver:
    """``behave`` decides each answer; the default takes everything."""

    url: str = ""
    behave: Behaviour | None = None
    got: list[Request] = field(default_factory=list[Request])
    most_at_once: int = 0
    _at_once: int = 0
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])
    _server: asyncio.Server | None = None
    _port: int = 0

    @property
    def taken(self) -> list[Request]:
        """Those answered with 2xx, in order."""
        return [r for r in self.got if 200 <= r.status < 300]

    async def open(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/hook"

    async def close(self) -> None:
        """Be away: every connection is cut, and none is accepted."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                await self._one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {n.lower(): v for n, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        request = Request(path=first.split(" ")[1], headers=headers, body=body, status=0)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply: Reply = (200, {}) if self.behave is None else await self.behave(request)
            if reply is None:
                self.got.append(request)
                await reader.read()  # until the other side has had enough
                raise ConnectionResetError
            status, more = reply
            self.got.append(Request(path=request.path, headers=headers, body=body, status=status))
        finally:
            self._at_once -= 1
        said = "".join(f"{n}: {v}\r\n" for n, v in more.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{said}content-length: 2\r\n\r\nok".encode())
        await writer.drain()


@asynccontextmanager
async def receiving(behave: Behaviour | None = None) -> AsyncGenerator[Receiver]:
    receiver = Receiver(behave=behave)
    await receiver.open()
    try:
        yield receiver
    finally:
        await receiver.close()
