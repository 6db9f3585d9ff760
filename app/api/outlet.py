"""A request's own connection, for streams.

A frame that goes through ASGI's ``send`` has cost 12 µs of processor when it reaches the kernel (a task
switch, Litestar's hooks and handlers, uvicorn's checks), one that is written to the connection 2; the
kernel takes 6 more. For an answer that is nothing, but a thousand followers are told the same
bytes many times a second. So the server shows each request its connection, as an extension of the
ASGI scope, and a stream's frames are written to it straight away. The answer still begins and ends
through ``send`` (``Streamed``).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from litestar import Response
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_EXTENSION: Final = "sluice.outlet"


class Outlet:
    """Writes pieces of an answer that was begun with chunked encoding, and never waits."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    def write(self, piece: bytes) -> None:
        """Give a piece to the kernel, or to the buffer if the kernel takes no more."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    @property
    def is_full(self) -> bool:
        """Whether the client has to take something first; what is written yet would pile up."""
        return self._flow.write_paused

    async def drain(self) -> None:
        """Wait until the client has taken enough, or is gone."""
        await self._flow.drain()


class Protocol(HttpToolsProtocol):
    """uvicorn's, which shows every request its outlet."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # No reference to this protocol: it would keep every request alive until garbage is collected.
        extensions = {_EXTENSION: Outlet(self.transport, self.flow)}
        cast("dict[str, Any]", self.scope)["extensions"] = extensions


def of(scope: Mapping[str, Any]) -> Outlet:
    """The outlet of a request that this module's protocol has received."""
    return scope["extensions"][_EXTENSION]


class Streamed(Response[bytes]):
    """An answer of unknown length, whose body ``tell()`` writes to the outlet and whose last piece it
    returns. Cancelled as soon as the client is gone."""

    def __init__(
        self, tell: Callable[[], Awaitable[bytes]], *, media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(b"", media_type=media_type, headers=headers, status_code=200)
        self._tell = tell

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:  # noqa: ANN401 - Litestar's
        """Without what Litestar offers besides: layers' cookies and headers, of which there are none."""
        return _Streaming(
            self._tell, media_type=self.media_type, headers=self.headers, status_code=200
        )


class _Streaming(ASGIResponse):
    _should_set_content_length = False

    def __init__(self, tell: Callable[[], Awaitable[bytes]], **more: Any) -> None:  # noqa: ANN401 - passes through
        super().__init__(**more)
        self._tell = tell

    async def send_body(self, send: Send, receive: Receive) -> None:
        async def tell() -> None:
            words = await self._tell()
            await send({"type": "http.response.body", "body": words, "more_body": False})

        async with asyncio.TaskGroup() as group:
            telling = group.create_task(tell())
            # Comes when the client is gone, and also after the last piece.
            while (await receive())["type"] != "http.disconnect":
                pass
            telling.cancel()
