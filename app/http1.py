"""HTTP/1.1 over asyncio: one request, one reply, kept-alive connections. What provider calls ride on.

Why no HTTP library: see docs/decisions.md, 19. What is left out on purpose: proxies, redirects, cookies,
HTTP/2 and automatic repetition, because a repeated call may be paid twice; only the queue repeats.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

import httptools

from app.addresses import Guard

CONNECT_S = 10.0
"""The longest wait for TCP and TLS together; part of ``timeout_s``, not added to it."""

IDLE_S = 4.0
"""Idle connections are not reused after this: uvicorn, and so vLLM, closes them after 5 s, and a
request that meets the closing door counts as sent."""

NAME_S = 60.0
"""How long a resolved name is used for new connections."""

MOST_NAMES = 1000
MOST_HEAD_BYTES = 256 * 1024
MOST_HEADER_CHARS = 1024


class FaultError(Exception):
    """The exchange did not end in an HTTP response that can be classified."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Origin:
    host: str
    port: int
    secure: bool


@dataclass(frozen=True, slots=True)
class Reply:
    status_code: int
    headers: dict[str, str]
    body: bytes


def too_large(most_bytes: int) -> FaultError:
    return FaultError("response_too_large", f"The answer has more than {most_bytes:,} bytes.")


class Connection(asyncio.Protocol):
    """One connection: one exchange at a time, and reusable only after a clean one.

    httptools calls the ``on_…`` methods. They must not raise, so what goes wrong is put into the
    waiter by `_fail`. Every way out of `exchange` but a clean one closes the connection, and that
    is what makes cancellation free it and a late byte harmless to the next call.
    """

    def __init__(self, origin: Origin, all_open: "set[Connection]") -> None:
        self.origin = origin
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle_since = 0.0
        self._all_open = all_open
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Reply] | None = None
        self._most_bytes = 0
        self._reset()
        self._complete = True  # nothing has been asked yet

    def _reset(self) -> None:
        self._status: int | None = None
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._head_bytes = 0
        self._head_done = False
        self._has_length = False
        self._complete = False
        self._is_spent = False

    async def exchange(self, request: bytes, *, most_bytes: int) -> Reply:
        """Send a request and wait for its whole response; raises FaultError."""
        self._reset()
        self._most_bytes = most_bytes
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if self._transport is None or self._transport.is_closing():
                self._fail("cut", "The provider closed the connection.")
            else:
                self._transport.write(request)
            return await self._waiter
        except BaseException:
            self.abort()
            raise
        finally:
            self._waiter = None

    def received(self) -> tuple[int | None, dict[str, str]]:
        """Return what is known of a response that did not become complete."""
        return (self._status, self._headers) if self._head_done else (None, {})

    def abort(self) -> None:
        """Close at once; a waiting exchange ends as ``closed``."""
        self._fail("closed", "The worker is stopping.")
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_reusable(self) -> bool:
        """Whether the last exchange, if there was one, left nothing behind."""
        return (
            self._complete
            and not self._is_spent
            and self._transport is not None
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    def _fail(self, code: str, message: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(FaultError(code, message))

    def _finish(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(Reply(self._status or 0, self._headers, bytes(self._body)))

    def _overflow(self) -> None:
        """More than we keep. An error's text is dispensable, an answer is not."""
        self._is_spent = True
        if self._status is not None and self._status < HTTPStatus.MULTIPLE_CHOICES:
            error = too_large(self._most_bytes)
            self._fail(error.code, error.message)
        else:
            self._body.clear()
            self._finish()

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._all_open.add(self)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self._is_spent = True
            if self._transport is not None:
                self._transport.abort()
            return
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._complete = False
            self._fail("garbage", "The provider's answer is not HTTP.")
        if not self._head_done and self._head_bytes > MOST_HEAD_BYTES:
            self._fail("garbage", "The provider's answer has too many headers.")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_done and exc is None and not self._has_length:
            self._finish()  # RFC 9112 §6.3: such a body ends with its connection
        else:
            when = "in the middle of" if self._head_done else "before"
            self._fail("cut", f"The provider closed the connection {when} its answer.")
        if not self.closed.done():
            self.closed.set_result(None)
        self._all_open.discard(self)

    # httptools calls these.

    def on_message_begin(self) -> None:
        self._is_spent = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._complete:
            key = name.decode("latin-1").lower()
            self._headers.setdefault(key, value.decode("latin-1").strip())

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._complete or status < HTTPStatus.OK:
            return
        self._status = status
        self._head_done = True
        length = self._headers.get("content-length", "")
        self._has_length = bool(length) or "transfer-encoding" in self._headers
        if length.isdecimal() and int(length) > self._most_bytes:
            self._overflow()

    def on_body(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            return
        self._body += data
        if len(self._body) > self._most_bytes:
            self._overflow()

    def on_message_complete(self) -> None:
        if not self._head_done:  # an interim response, like 100 Continue or 103 Early Hints
            self._headers = {}
        elif not self._complete:
            self._complete = True
            self._is_spent = not self._parser.should_keep_alive()
            self._finish()


class Connections:
    """Open connections by origin; the most recently used one is taken first.

    With a ``guard`` every address is asked about just before it is connected to; None trusts all.
    """

    def __init__(self, *, most: int, guard: Guard | None = None) -> None:
        self._most = most
        self._guard = guard
        self._open: set[Connection] = set()
        self._idle: dict[Origin, deque[Connection]] = {}
        self._names: dict[tuple[str, int], tuple[float, asyncio.Task[list[str]]]] = {}
        self._tls: ssl.SSLContext | None = None
        self._is_closed = False

    def idle(self, origin: Origin) -> Connection | None:
        """Take a connection that can be used at once."""
        waiting = self._idle.get(origin)
        while waiting:
            connection = waiting.pop()
            if connection.is_reusable and time.monotonic() - connection.idle_since < IDLE_S:
                return connection
            connection.abort()
        return None

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next call, or close it where it cannot be trusted."""
        if self._is_closed or not connection.is_reusable:
            connection.abort()
            return
        now = time.monotonic()
        connection.idle_since = now
        waiting = self._idle.setdefault(connection.origin, deque())
        waiting.append(connection)
        while waiting and now - waiting[0].idle_since >= IDLE_S:
            waiting.popleft().abort()

    async def open(self, origin: Origin) -> Connection:
        """Connect; raises FaultError, and then nothing was sent."""
        if self._is_closed:
            raise FaultError("closed", "The worker is stopping.")
        self._make_room()
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await self._connect(origin)
        except TimeoutError:
            raise FaultError("connect", "The provider did not accept a connection.") from None
        except socket.gaierror:
            raise FaultError("dns", "The provider's host name cannot be resolved.") from None
        except ssl.SSLCertVerificationError as error:
            why = error.verify_message
            raise FaultError("tls", f"The provider's certificate is not trusted: {why}.") from None
        except ssl.SSLError:
            raise FaultError("tls", "The provider and Sluice agree on no TLS.") from None
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise FaultError("connect", f"The provider cannot be connected to: {why}.") from None
        if self._is_closed:
            connection.abort()
            raise FaultError("closed", "The worker is stopping.")
        return connection

    async def _connect(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = self._fit(await self._addresses(origin), origin)
        for place, address in enumerate(addresses):
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(origin, self._open),
                    address,
                    origin.port,
                    ssl=self._context() if origin.secure else None,
                    server_hostname=origin.host if origin.secure else None,
                )
            except ssl.SSLError:
                raise
            except OSError:
                if place == len(addresses) - 1:
                    raise
            else:
                return connection
        raise OSError(0, "the name has no address")

    def _fit(self, addresses: list[str], origin: Origin) -> list[str]:
        """Those that may be connected to. Raises FaultError when the guard refuses all."""
        if self._guard is None:
            return addresses
        refusals = [self._guard.refusal(a, is_secure=origin.secure) for a in addresses]
        fit = [a for a, refusal in zip(addresses, refusals, strict=True) if refusal is None]
        if not fit and addresses:
            raise FaultError("address_not_allowed", f"The URL {refusals[0]}.")
        return fit

    async def _addresses(self, origin: Origin) -> list[str]:
        """Resolve once for many connections: a thousand look-ups would queue for a few threads."""
        key, now = (origin.host, origin.port), time.monotonic()
        begun, task = self._names.get(key, (0.0, None))
        failed = task is not None and task.done() and (task.cancelled() or task.exception())
        if task is None or failed or now - begun > NAME_S:
            if len(self._names) >= MOST_NAMES:
                self._names.clear()
            task = asyncio.create_task(_resolve(*key))
            task.add_done_callback(_looked_at)
            self._names[key] = (now, task)
        return await asyncio.shield(task)

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    def _make_room(self) -> None:
        """Close the oldest idle connection of any origin where the limit is reached."""
        if len(self._open) >= self._most:
            for waiting in self._idle.values():
                if waiting:
                    waiting.popleft().abort()
                    return

    async def close(self) -> None:
        self._is_closed = True
        self._idle.clear()
        still_open = list(self._open)
        for connection in still_open:
            connection.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.gather(*(connection.closed for connection in still_open))


def _looked_at(task: "asyncio.Task[list[str]]") -> None:
    """Keep asyncio from complaining of a failure that no cancelled call waited for."""
    if not task.cancelled():
        task.exception()


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]
