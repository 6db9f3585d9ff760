"""One message to another program: an HTTP POST to a URL that a user gave. Knows HTTP, not Postgres.

The receiver is hostile until proven otherwise. Its address is checked when it is connected to, and
that very address is used (`app.addresses`); redirects are not followed; of the answer the status
counts, and of its body at most 64 KiB are read and nothing is kept, decompressed or shown; all of it
has ``timeout_s``. Proxies that the environment names are not used.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from app import addresses, signatures
from app.addresses import Guard
from app.http1 import Connections, FaultError, Origin
from app.rate_limits import retry_after_s

MOST_ANSWER_BYTES: Final = 64 * 1024

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_VALUE: Final = re.compile(r"[^\t\x20-\x7e]")
_MOST_HEADERS: Final = 50
_MOST_VALUE_CHARS: Final = 4096
_MOST_HEADER_CHARS: Final = 16 * 1024
#: What frames the message, identifies it, or speaks to the next hop (RFC 9110 §7.6.1).
_OURS: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "webhook-id",
        "webhook-signature",
        "webhook-timestamp",
    }
)

_FAULTS: Final = {
    "closed": "The sender was stopped.",
    "connect": "The receiver cannot be connected to.",
    "cut": "The receiver closed the connection before its answer was complete.",
    "dns": "The receiver's host name cannot be resolved.",
    "garbage": "The receiver's answer is not HTTP.",
    "tls": "The receiver's certificate is not trusted, or it speaks no TLS.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What to send. ``message_id`` stays the same whenever it is sent again; it has no dot."""

    url: str
    message_id: str
    body: bytes = field(repr=False)
    secrets: Sequence[str] = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What came of it. ``error_code`` is None when it was taken: any status from 200 to 299.

    ``retry_after_s``: how long the receiver asked to be left alone, within bounds.
    """

    status_code: int | None
    error_code: str | None
    error_message: str | None
    latency_ms: int
    retry_after_s: float | None = None

    @property
    def is_overload(self) -> bool:
        """Whether the receiver is absent or asks for fewer, rather than refusing this message."""
        code = self.status_code
        return self.error_code is not None and (
            code is None
            or code == HTTPStatus.TOO_MANY_REQUESTS
            or code >= HTTPStatus.INTERNAL_SERVER_ERROR
        )


_ASKS_TO_WAIT: Final = frozenset({429, 502, 503, 504})


def problems_of_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is wrong with headers that a user wants to be sent: (name, sentence)."""
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, value in headers.items():
        known = name.lower()
        if not _HEADER_NAME.fullmatch(name):
            found.append((name, "is not the name of a header"))
        elif known in _OURS or known.startswith("proxy-"):
            found.append((name, "is set by Sluice and cannot be replaced"))
        elif known in seen:
            found.append((name, "is given twice"))
        elif _NOT_IN_VALUE.search(value):
            found.append((name, "has a value with characters other than printable ASCII"))
        elif len(value) > _MOST_VALUE_CHARS:
            found.append((name, f"has a value of more than {_MOST_VALUE_CHARS:,} characters"))
        seen.add(known)
    if len(headers) > _MOST_HEADERS:
        found.append(("", f"must be at most {_MOST_HEADERS}"))
    elif sum(len(n) + len(v) for n, v in headers.items()) > _MOST_HEADER_CHARS:
        found.append(("", f"must have at most {_MOST_HEADER_CHARS:,} characters together"))
    return found


class Courier:
    """Posts messages over kept-alive connections; use one per process and close it."""

    def __init__(self, *, guard: Guard, timeout_s: float, most: int) -> None:
        self._timeout_s = timeout_s
        self._connections = Connections(most=most, guard=guard)

    async def close(self) -> None:
        """Close every connection; messages on their way end as ``closed``."""
        await self._connections.close()

    async def post(self, message: Message) -> Receipt:
        """Post a message once. Raises nothing but CancelledError."""
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                status, retry_after = await self._exchange(message)
        except TimeoutError:
            said = f"The receiver did not answer within {self._timeout_s:g} s."
            return _failed(begun, None, "timeout", said)
        except FaultError as fault:
            return _failed(begun, None, fault.code, _FAULTS.get(fault.code, fault.message))
        if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            return Receipt(
                status_code=status, error_code=None, error_message=None, latency_ms=_ms(begun)
            )
        if status < HTTPStatus.BAD_REQUEST:
            said = f"The receiver redirects ({status}), which is not followed; correct the URL."
            return _failed(begun, status, "redirect", said)
        said = f"The receiver answered {status}."
        return _failed(begun, status, "refused", said, retry_after=retry_after)

    async def _exchange(self, message: Message) -> tuple[int, float | None]:
        """The status of the answer, and how long it asks to wait. Raises FaultError."""
        try:
            target = addresses.target(message.url)
        except ValueError as error:
            raise FaultError("bad_url", f"The URL {error}.") from None
        request = _request(message, target)
        origin = Origin(target.host, target.port, target.is_secure)
        connection = self._connections.idle(origin)
        is_used = connection is not None
        while True:
            if connection is None:
                connection = await self._connections.open(origin)
            try:
                reply = await connection.exchange(request, most_bytes=MOST_ANSWER_BYTES)
            except FaultError as fault:
                status, _ = connection.received()
                if fault.code == "response_too_large" and status is not None:
                    return status, None  # it was taken; the rest of the answer is not ours to keep
                if fault.code == "cut" and status is None and is_used:
                    # The receiver closed an idle connection as we used it. Twice is allowed.
                    connection, is_used = None, False
                    continue
                raise
            self._connections.give_back(connection)
            asks = reply.status_code in _ASKS_TO_WAIT
            return reply.status_code, (
                retry_after_s(reply.headers, throttled=False) if asks else None
            )


def _request(message: Message, target: addresses.Target) -> bytes:
    timestamp = int(time.time())
    signed = signatures.signature(
        message_id=message.message_id,
        timestamp=timestamp,
        body=message.body,
        secrets_=message.secrets,
    )
    headers = {
        **message.headers,
        "accept": "*/*",
        "content-type": "application/json",
        "content-length": str(len(message.body)),
        "user-agent": "sluice",
        "webhook-id": message.message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signed,
    }
    lines = [f"POST {target.path} HTTP/1.1\r\nhost: {target.authority}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    return "".join([*lines, "\r\n"]).encode("latin-1") + message.body


def _failed(
    begun: float, status: int | None, code: str, said: str, *, retry_after: float | None = None
) -> Receipt:
    return Receipt(
        status_code=status,
        error_code=code,
        error_message=said,
        latency_ms=_ms(begun),
        retry_after_s=retry_after,
    )


def _ms(begun: float) -> int:
    return round((time.perf_counter() - begun) * 1000)
