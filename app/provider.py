"""One call to a language model: a request goes in, an outcome comes out. Knows HTTP, not Postgres.

`Provider.call` never raises (but `asyncio.CancelledError`); what happened is a value:

Answered      the provider answered; ``body`` is its JSON, byte for byte
Rejected      final: the same request would be refused again, or its answer was paid and is unusable
Throttled     no failure of the item: the provider wants fewer calls, and says until when
Unreachable   worth a retry; ``sent`` is False only where the request certainly never left

How an outcome is chosen (`_verdict`, `_failed` and `Provider.call` implement these lines, in this
order; ``n/a`` means that no status came):

status          what came                                   outcome      code
n/a             the request cannot be built                 Rejected     bad_request_body, bad_url,
                                                                         bad_header
n/a             the provider was closed before or meanwhile Unreachable  closed
n/a             name not found                              Unreachable  dns          (not sent)
n/a             no connection, or none within 10 s          Unreachable  connect      (not sent)
n/a             TLS refused                                 Unreachable  tls          (not sent)
n/a             no connection before ``send_by``            Unreachable  late         (not sent)
any             not finished after ``timeout_s``            Unreachable  timeout      (sent, unless it
                                                                         still waited or connected)
any             connection closed too early                 Unreachable  cut
any             not HTTP, or an encoding we did not ask for Unreachable  garbage
2xx             more than ``max_response_bytes``            Rejected     response_too_large
2xx             a JSON object without an ``error``          Answered
2xx             anything else                               Unreachable  garbage
3xx             redirects are not followed                  Rejected     redirect
429             error.code or type is insufficient_quota    Throttled    insufficient_quota
429             code, type or message of concurrent or      Throttled    concurrency_limited
                parallel requests
429             otherwise                                   Throttled    rate_limited
529             otherwise                                   Throttled    overloaded
503             with Retry-After, or "overloaded"           Throttled    overloaded
408 409 425     otherwise                                   Unreachable  server_error
501 505         otherwise                                   Rejected     rejected
other 5xx       otherwise                                   Unreachable  server_error
other 4xx       otherwise                                   Rejected     see `_REFUSALS`

The transport is `app.http1`; why it is ours stands in docs/decisions.md, 19.
"""

import asyncio
import functools
import json
import logging
import re
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from types import TracebackType
from typing import Annotated, Literal, NoReturn, Self, TypeVar, assert_never, cast
from urllib.parse import quote, urlsplit

import msgspec

from app.http1 import (
    MOST_HEADER_CHARS,
    Connection,
    Connections,
    FaultError,
    Origin,
    Reply,
    too_large,
)
from app.rate_limits import RateLimit, rate_limits, retry_after_s

MOST_QUOTED_CHARS = 500
QUOTA_RETRY_AFTER_S = 60.0

_log = logging.getLogger("sluice.provider")


# What goes in and comes out ------------------------------------------------------------------------


class Endpoint(StrEnum):
    """The OpenAI endpoints that a batch may name."""

    chat_completions = "/v1/chat/completions"
    responses = "/v1/responses"
    embeddings = "/v1/embeddings"
    completions = "/v1/completions"
    moderations = "/v1/moderations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to a provider.

    ``base_url`` may end in a version (``http://host/v1``, ``…/openai/v1/``, ``…/v1beta/openai``) or
    not (``http://host``). ``body`` is the JSON object as the user gave it: ``model`` is overwritten,
    ``stream``, ``stream_options`` and ``vmx`` are removed, everything else is sent byte for byte.
    ``default_args`` is a JSON object too; its keys count where ``body`` does not have them; those of
    ``override_args`` count even where it has.
    ``headers`` cannot replace what frames the message (host, length, encoding, connection).
    ``timeout_s`` bounds everything from the wait for a free connection to the last byte.
    ``send_by``: by `time.monotonic`; a call whose connection is there later is not sent (``late``).
    """

    base_url: str
    endpoint: Endpoint
    model: str
    body: bytes = field(repr=False)
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    default_args: bytes | None = field(default=None, repr=False)
    override_args: bytes | None = field(default=None, repr=False)
    idempotency_key: str | None = None
    send_by: float | None = None


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens as the provider counts them; cached ones are part of input, reasoning of output."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The provider answered with a JSON object. ``usage`` is None where it did not say."""

    status_code: int
    body: bytes = field(repr=False)
    headers: dict[str, str]
    usage: Usage | None
    model: str | None
    request_id: str | None
    latency_ms: int
    rate_limits: tuple[RateLimit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """Final. ``message`` may quote the provider: keep it with the item, do not log it.

    ``body`` is the provider's own JSON object, None where there is none. ``status_code`` is None
    where the request could not be built.
    """

    status_code: int | None
    code: str
    message: str
    body: bytes | None = field(default=None, repr=False)
    headers: dict[str, str] = field(default_factory=dict[str, str])
    request_id: str | None = None
    latency_ms: int
    rate_limits: tuple[RateLimit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttled:
    """The provider wants fewer calls. ``retry_after_s`` is None where it did not say how long."""

    status_code: int
    retry_after_s: float | None
    code: str
    message: str
    headers: dict[str, str]
    request_id: str | None
    latency_ms: int
    rate_limits: tuple[RateLimit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """Worth a retry. ``sent`` is False only where the provider certainly saw nothing."""

    code: str
    status_code: int | None = None
    message: str
    retry_after_s: float | None = None
    sent: bool = True
    headers: dict[str, str] = field(default_factory=dict[str, str])
    request_id: str | None = None
    latency_ms: int
    rate_limits: tuple[RateLimit, ...] = ()


Outcome = Answered | Rejected | Throttled | Unreachable


class Provider:
    """Makes calls over kept-alive connections; use one per process and close it.

    At most ``max_connections`` calls are in flight, further ones wait within their own deadline.
    Not more connections than that are open either. A cancelled call closes its connection at once.
    """

    def __init__(
        self, *, max_connections: int = 1000, max_response_bytes: int = 32 * 1024 * 1024
    ) -> None:
        self._max_response_bytes = max_response_bytes
        self._slots = asyncio.Semaphore(max_connections)
        self._connections = Connections(most=max_connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; calls in flight end as Unreachable ``closed``."""
        await self._connections.close()

    async def call(self, call: Call) -> Outcome:
        """Make one call. Raises nothing but CancelledError."""
        begun = time.perf_counter()
        connection: Connection | None = None
        sent = False
        try:
            target = _target(call.base_url, call.endpoint)
            request = _request(call, target)
            async with asyncio.timeout(call.timeout_s), self._slots:
                connection = self._connections.idle(target.origin)
                if connection is None:
                    connection = await self._connections.open(target.origin)
                if call.send_by is not None and time.monotonic() > call.send_by:
                    self._connections.give_back(connection)
                    raise FaultError("late", "There was no connection in time.")  # noqa: TRY301 - all faults end in one place below
                sent = True
                reply = await connection.exchange(request, most_bytes=self._max_response_bytes)
                self._connections.give_back(connection)
            reply = _decoded(reply, most_bytes=self._max_response_bytes)
            return _classify(call, reply, host=target.origin.host, latency_ms=_ms_since(begun))
        except FaultError as fault:
            return _failed(call, fault, connection, sent=sent, latency_ms=_ms_since(begun))
        except TimeoutError:
            what = "did not answer" if sent else "could not be asked"
            fault = FaultError("timeout", f"The provider {what} within {call.timeout_s:g} s.")
            return _failed(call, fault, connection, sent=sent, latency_ms=_ms_since(begun))
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not end the worker
            _log.error("provider.call_crashed error=%s", type(error).__name__)
            fault = FaultError("internal", f"Sluice failed: {type(error).__name__}.")
            return _failed(call, fault, connection, sent=sent, latency_ms=_ms_since(begun))


def _ms_since(begun: float) -> int:
    return round((time.perf_counter() - begun) * 1000)


# Building the request -----------------------------------------------------------------------------

_FINAL_FAULTS = {"bad_request_body", "bad_url", "bad_header", "response_too_large"}
_VERSIONED = re.compile(r"/v\d+[a-z0-9]*(/openai)?$")
_URL_CHARS = "/%:@!$&'()*+,;=~"
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_HEADER = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
_OURS_ALONE = {
    "accept-encoding",
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_HELD_SECRET = re.compile("auth|key|token|secret")


@dataclass(frozen=True, slots=True)
class _Target:
    origin: Origin
    head: str
    """The request line and the headers that are the same for every call."""


@functools.lru_cache(maxsize=1024)
def _target(base_url: str, endpoint: Endpoint) -> _Target:
    def refuse(why: str) -> NoReturn:
        raise FaultError("bad_url", f"The connection's base URL {why}.")

    try:
        url = urlsplit(base_url.strip())
        host = url.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode()
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError:
        refuse("is not a URL")
    if url.scheme not in {"http", "https"}:
        refuse("must begin with http:// or https://")
    if not host or not _HOST.fullmatch(host):
        refuse("has no usable host")
    if "@" in url.netloc:
        refuse("must not contain credentials; give the key as the connection's secret")
    path = url.path.rstrip("/")
    path += endpoint.removeprefix("/v1") if _VERSIONED.search(path) else endpoint
    path = quote(path, safe=_URL_CHARS)
    query = f"?{quote(url.query, safe=_URL_CHARS + '?')}" if url.query else ""
    shown = f"[{host}]" if ":" in host else host
    if port != (443 if url.scheme == "https" else 80):
        shown += f":{port}"
    head = f"POST {path}{query} HTTP/1.1\r\nhost: {shown}\r\ncontent-type: application/json\r\n"
    return _Target(Origin(host, port, url.scheme == "https"), head)


def _request(call: Call, target: _Target) -> bytes:
    body = _body(call)
    headers = {"accept": "application/json", "user-agent": "sluice"}
    if call.api_key is not None:
        headers["authorization"] = f"Bearer {call.api_key}"
    headers |= {name.lower(): value for name, value in call.headers.items()}
    if call.idempotency_key is not None:
        headers["idempotency-key"] = call.idempotency_key
    lines = [target.head]
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or _NOT_IN_HEADER.search(value):
            what = "The API key" if name == "authorization" else f"The header {name[:60]!r}"
            raise FaultError("bad_header", f"{what} has characters that HTTP cannot carry.")
        if name not in _OURS_ALONE:
            lines.append(f"{name}: {value}\r\n")
    lines.append(f"content-length: {len(body)}\r\n\r\n")
    return "".join(lines).encode("latin-1") + body


def _body(call: Call) -> bytes:
    members = _members(call.body)
    defaults = _members(call.default_args) if call.default_args else {}
    if members is None or defaults is None:
        raise FaultError("bad_request_body", "The request is not a JSON object.")
    overrides = (_members(call.override_args) or {}) if call.override_args else {}
    members = {**members, **{k: v for k, v in defaults.items() if k not in members}, **overrides}
    for unwanted in ("stream", "stream_options", "vmx"):
        members.pop(unwanted, None)
    members["model"] = _json_string(call.model)
    return b"{%b}" % b",".join(
        b"%b:%b" % (_json_string(name), value) for name, value in members.items()
    )


def _json_string(text: str) -> bytes:
    try:
        return msgspec.json.encode(text)
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can write
        return json.dumps(text).encode()


def _members(text: bytes) -> dict[str, bytes] | None:
    """Take a JSON object apart at its top level; the values stay as they are. None: it is none."""
    try:
        text.decode()
        return {
            name: bytes(value)
            for name, value in msgspec.json.decode(text, type=dict[str, msgspec.Raw]).items()
        }
    except msgspec.ValidationError:
        return None
    except msgspec.DecodeError:
        return _lone_surrogates_too(text)
    except (UnicodeDecodeError, RecursionError):
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON


# Numbers are not read: a digit more than Python likes must not refuse a request.
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_no_constant)
_SPACE = re.compile(r"[ \t\n\r]*")


def _lone_surrogates_too(given: bytes) -> dict[str, bytes] | None:
    r"""Do the same as `_members`, slower, for text that msgspec refuses: ``"\ud800"`` is valid JSON."""
    text = given.decode()
    members: dict[str, bytes] = {}

    def skip(at: int) -> int:
        found = _SPACE.match(text, at)
        return found.end() if found else at

    try:
        at = skip(0)
        if text[at] != "{":
            return None
        at = skip(at + 1)
        while text[at] != "}":
            if members:
                if text[at] != ",":
                    return None
                at = skip(at + 1)
            if text[at] != '"':
                return None
            name, at = _SCANNER.raw_decode(text, at)
            at = skip(at)
            if text[at] != ":":
                return None
            begin = skip(at + 1)
            _, end = _SCANNER.raw_decode(text, begin)
            members[cast("str", name)] = text[begin:end].encode()
            at = skip(end)
        return members if skip(at + 1) == len(text) else None
    except (ValueError, IndexError, RecursionError):
        return None


# Choosing the outcome -----------------------------------------------------------------------------

_REFUSALS = {
    400: ("bad_request", "The provider refused the request."),
    401: ("unauthorized", "The provider refused the key."),
    402: ("payment_required", "The provider wants to be paid."),
    403: ("forbidden", "The provider does not allow this with this key."),
    404: ("not_found", "The provider does not have this model or endpoint."),
    405: ("not_found", "The provider does not have this endpoint."),
    413: ("request_too_large", "The request is larger than the provider allows."),
    415: ("bad_request", "The provider refused the request."),
    422: ("unprocessable", "The provider cannot process the request."),
}
_KEPT_HEADERS = {
    "cf-ray",
    "date",
    "openai-model",
    "openai-organization",
    "openai-processing-ms",
    "openai-version",
    "request-id",
    "retry-after",
    "retry-after-ms",
}
_CONCURRENCY = re.compile("concurren|simultaneous|parallel[ _-]?(request|call)", re.IGNORECASE)
_NO_RAW = msgspec.Raw(b"null")


class _Top(msgspec.Struct):
    """What we look at in any body; everything else is passed on unread."""

    error: msgspec.Raw = _NO_RAW
    usage: msgspec.Raw = _NO_RAW
    model: msgspec.Raw = _NO_RAW
    message: msgspec.Raw = _NO_RAW
    detail: msgspec.Raw = _NO_RAW


class _Error(msgspec.Struct):
    message: msgspec.Raw = _NO_RAW
    code: msgspec.Raw = _NO_RAW
    type: msgspec.Raw = _NO_RAW


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = 0
    reasoning_tokens: _Count | None = 0


class _Usage(msgspec.Struct):
    """The usage of chat, completions and embeddings (``prompt_…``) and of responses (``input_…``)."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


@dataclass(frozen=True, slots=True)
class _Verdict:
    kind: Literal["answered", "rejected", "throttled", "unreachable"]
    code: str = ""
    message: str = ""


def _verdict(  # noqa: C901, PLR0911, PLR0912 - the table of the module's docstring, line by line
    status: int,
    *,
    top: _Top | None,
    labels: Collection[str | None],
    is_crowded: bool,
    retry_after: float | None,
) -> _Verdict:
    """Choose the outcome of a complete HTTP response: the one place where that is decided."""
    if status < HTTPStatus.MULTIPLE_CHOICES:
        if top is None:
            return _Verdict("unreachable", "garbage", "The provider answered with no JSON object.")
        if bytes(top.error) != b"null":
            return _Verdict(
                "unreachable", "garbage", f"The provider answered {status} and an error."
            )
        return _Verdict("answered")
    if status < HTTPStatus.BAD_REQUEST:
        how = "The provider redirects; correct the connection's base URL."
        return _Verdict("rejected", "redirect", how)
    match status:
        case 429 if "insufficient_quota" in labels:
            return _Verdict("throttled", "insufficient_quota", "The account has no quota left.")
        case 429 if is_crowded:
            how = "The provider allows no more calls at once."
            return _Verdict("throttled", "concurrency_limited", how)
        case 429:
            return _Verdict("throttled", "rate_limited", "The provider's rate limit is reached.")
        case 529:
            return _Verdict("throttled", "overloaded", "The provider is overloaded.")
        case 503 if retry_after is not None or any("overloaded" in (x or "") for x in labels):
            return _Verdict("throttled", "overloaded", "The provider is overloaded.")
        case 408 | 409 | 425:
            return _Verdict("unreachable", "server_error", f"The provider failed ({status}).")
        case 501 | 505:
            return _Verdict(
                "rejected", "rejected", f"The provider does not support this ({status})."
            )
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return _Verdict("unreachable", "server_error", f"The provider failed ({status}).")
        case _:
            ours = ("rejected", f"The provider refused the request ({status}).")
            return _Verdict("rejected", *_REFUSALS.get(status, ours))


def _classify(call: Call, reply: Reply, *, host: str, latency_ms: int) -> Outcome:
    """Make the outcome of a complete HTTP response."""
    status, secrets = reply.status_code, _secrets(call)
    top = _top(reply.body)
    failed = status >= HTTPStatus.MULTIPLE_CHOICES or top is None or bytes(top.error) != b"null"
    error = _read(top.error, _Error) if top and failed else None
    labels = {_read(error.code, str), _read(error.type, str)} if error else set[str | None]()
    said = _said(top, error) if top and failed else ""
    throttled = status == HTTPStatus.TOO_MANY_REQUESTS
    is_crowded = any(_CONCURRENCY.search(x) for x in (*labels, said) if x)
    # Too many at once is over when one of them ends: the resets of rates say nothing of that.
    by_rate = throttled and not is_crowded
    retry_after = retry_after_s(reply.headers, throttled=by_rate) if failed else None
    if retry_after is None and throttled and "insufficient_quota" in labels:
        retry_after = QUOTA_RETRY_AFTER_S
    verdict = _verdict(
        status, top=top, labels=labels, is_crowded=is_crowded, retry_after=retry_after
    )
    message = verdict.message + _quoted(said, secrets)
    headers, request_id = _kept(reply.headers, secrets), _request_id(reply.headers)
    limits = rate_limits(reply.headers, host=host)
    match verdict.kind:
        case "answered":
            return Answered(
                status_code=status,
                body=reply.body,
                headers=headers,
                usage=usage(top.usage) if top else None,
                model=_clean(_read(top.model, str)) if top else None,
                request_id=request_id,
                latency_ms=latency_ms,
                rate_limits=limits,
            )
        case "rejected":
            return Rejected(
                status_code=status,
                code=verdict.code,
                message=message,
                body=_scrubbed_body(reply.body, secrets) if top else None,
                headers=headers,
                request_id=request_id,
                latency_ms=latency_ms,
                rate_limits=limits,
            )
        case "throttled":
            return Throttled(
                status_code=status,
                retry_after_s=retry_after,
                code=verdict.code,
                message=message,
                headers=headers,
                request_id=request_id,
                latency_ms=latency_ms,
                rate_limits=limits,
            )
        case "unreachable":
            return Unreachable(
                code=verdict.code,
                status_code=status,
                message=message,
                retry_after_s=retry_after,
                headers=headers,
                request_id=request_id,
                latency_ms=latency_ms,
                rate_limits=limits,
            )
        case _:
            assert_never(verdict.kind)


def _failed(
    call: Call, fault: FaultError, connection: "Connection | None", *, sent: bool, latency_ms: int
) -> Rejected | Unreachable:
    """Choose the outcome where no complete response came."""
    status, received = connection.received() if connection else (None, dict[str, str]())
    headers, request_id = _kept(received, _secrets(call)), _request_id(received)
    if fault.code in _FINAL_FAULTS:
        return Rejected(
            status_code=status,
            code=fault.code,
            message=fault.message,
            headers=headers,
            request_id=request_id,
            latency_ms=latency_ms,
        )
    return Unreachable(
        code=fault.code,
        status_code=status,
        message=fault.message,
        sent=sent,
        headers=headers,
        request_id=request_id,
        latency_ms=latency_ms,
    )


def _decoded(reply: Reply, *, most_bytes: int) -> Reply:
    """Undo a compression that the provider applied although we asked for none."""
    encoding = reply.headers.get("content-encoding", "identity").lower()
    if encoding == "identity" or not reply.body:
        return reply
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise FaultError("garbage", f"The answer's encoding {encoding[:20]!r} is unknown.")
    inflate = zlib.decompressobj(wbits=47)  # 47: gzip or zlib, whichever it is
    try:
        body = inflate.decompress(reply.body, most_bytes + 1)
    except zlib.error:
        raise FaultError("garbage", "The answer cannot be decompressed.") from None
    if len(body) > most_bytes:
        raise too_large(most_bytes)
    if not inflate.eof:
        raise FaultError("cut", "The compressed answer is not complete.")
    return Reply(reply.status_code, reply.headers, body)


def _top(body: bytes) -> _Top | None:
    """Look into a JSON object in valid UTF-8; None: it is none."""
    try:
        body.decode()
        return msgspec.json.decode(body, type=_Top)
    except (msgspec.ValidationError, UnicodeDecodeError, RecursionError):
        return None
    except msgspec.DecodeError:
        members = _lone_surrogates_too(body)
        if members is None:
            return None
        known = {
            name: msgspec.Raw(members[name]) for name in _Top.__struct_fields__ if name in members
        }
        return _Top(**known)


_T = TypeVar("_T")


def _read(raw: msgspec.Raw, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError):
        return None


def usage(raw: msgspec.Raw | bytes) -> Usage | None:
    """Read the ``usage`` of any endpoint; None where it is missing or not what OpenAI documents."""
    found = _read(msgspec.Raw(raw), _Usage)
    if found is None:
        return None
    if found.input_tokens is not None:
        read, read_details = found.input_tokens, found.input_tokens_details
        written, written_details = found.output_tokens, found.output_tokens_details
    elif found.prompt_tokens is not None:
        read, read_details = found.prompt_tokens, found.prompt_tokens_details
        written, written_details = found.completion_tokens, found.completion_tokens_details
    else:
        return None
    return Usage(
        input_tokens=read,
        output_tokens=written or 0,
        cached_tokens=(read_details.cached_tokens or 0) if read_details else 0,
        reasoning_tokens=(written_details.reasoning_tokens or 0) if written_details else 0,
    )


def _said(top: _Top, error: _Error | None) -> str:
    """Find the provider's words: OpenAI's ``error.message``, or what others write in its place."""
    places = [error.message if error else top.error, top.message, top.detail]
    return next((text for text in (_clean(_read(raw, str)) for raw in places) if text), "")


def _quoted(said: str, secrets: Sequence[str]) -> str:
    return f" It says: {_scrubbed(said, secrets)[:MOST_QUOTED_CHARS]}" if said else ""


def _clean(text: str | None) -> str | None:
    """Replace what Postgres (NUL) or a terminal (control characters) would stumble over."""
    if not text or text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _secrets(call: Call) -> list[str]:
    """List what a provider might echo and nobody may read."""
    found = [call.api_key] if call.api_key else []
    for name, value in call.headers.items():
        if _HELD_SECRET.search(name.lower()):
            found += [word for word in value.split() if word.lower() not in {"bearer", "basic"}]
    return found


def _scrubbed(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "[key]")
    return text


def _scrubbed_body(body: bytes, secrets: Sequence[str]) -> bytes:
    for secret in secrets:
        body = body.replace(secret.encode(), b"[key]")
    return body


def _kept(headers: Mapping[str, str], secrets: Sequence[str]) -> dict[str, str]:
    return {
        name: _scrubbed(value, secrets)
        for name, value in headers.items()
        if (name.startswith(("x-", "anthropic-ratelimit-")) or name in _KEPT_HEADERS)
        and len(value) <= MOST_HEADER_CHARS
    }


def _request_id(headers: Mapping[str, str]) -> str | None:
    found = headers.get("x-request-id") or headers.get("request-id")
    return found[:MOST_HEADER_CHARS] if found else None
