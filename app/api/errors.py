"""Refusals on the wire: ``{"errorMessage", "errorCode", "details"}``, whatever went wrong.

A message is a sentence that Sluice wrote: never an exception's text, a prompt or a statement. Every
answer carries ``x-request-id``, the caller's own if it sent a sane one, which is also logged.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import msgspec
import psycopg
from litestar import Request, Response
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import Message, Scope
from psycopg_pool import PoolTimeout

from app.errors import (
    DatabaseUnavailableError,
    IssuerUnavailableError,
    QuotaError,
    RequestError,
    TooLargeError,
    UnauthenticatedError,
)
from app.ids import uuid7
from app.log import Log

log = Log("api")

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")
_SERVER_ERROR = 500
_CONFLICT = 409
_TOO_LARGE = 413

AnyRequest = Request[Any, Any, Any]


class StorageFullError(RequestError):
    """The disk cannot take the request's body; nothing of it was kept."""

    status: ClassVar[int] = 507


class BrokenOffError(RequestError):
    """The client went away while it was sending; nobody reads the answer."""


class ErrorBody(msgspec.Struct, kw_only=True):
    """What every refusal looks like."""

    errorMessage: str  # noqa: N815 - the wire's name
    errorCode: str  # noqa: N815 - the wire's name
    details: dict[str, object]


def request_id(scope: Mapping[str, Any]) -> str:
    """The id of a request: minted once, or taken from its ``x-request-id``."""
    state: dict[str, Any] = scope["state"]
    if "request_id" not in state:
        given = next((v for n, v in scope["headers"] if n == b"x-request-id"), b"")
        state["request_id"] = given.decode() if _SANE_ID.fullmatch(given) else uuid7().hex
    return state["request_id"]


async def stamp(message: Message, scope: Scope) -> None:
    """Put the request's id on its answer, and log the answer."""
    if message["type"] != "http.response.start" or scope["type"] != ScopeType.HTTP:
        return
    identity = request_id(cast("Mapping[str, Any]", scope))
    message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
    status = message["status"]
    note = log.warning if status >= _SERVER_ERROR else log.debug
    note(
        "request.answered",
        method=scope["method"],
        path=scope["path"],
        status=status,
        request_id=identity,
    )


def refusal(
    status: int,
    code: str,
    message: str,
    *,
    details: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response[bytes]:
    """An answer that says no."""
    body = ErrorBody(errorMessage=message, errorCode=code, details=dict(details or {}))
    return Response(
        msgspec.json.encode(body),
        status_code=status,
        media_type="application/json",
        headers={**(headers or {}), **({"x-should-retry": "false"} if status == _CONFLICT else {})},
    )


def _refused(_: AnyRequest, error: RequestError) -> Response[bytes]:
    headers: dict[str, str] = {}
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, IssuerUnavailableError):
        headers["retry-after"] = "2"
    if isinstance(error, TooLargeError | StorageFullError):
        headers["connection"] = "close"  # or the rest of the body would still be received
    if isinstance(error, QuotaError):
        headers["retry-after"] = str(error.retry_after_s)
    return refusal(error.status, error.code, str(error), details=error.details, headers=headers)


def _framework(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """What Litestar itself refuses: unknown routes, wrong methods, wrong parameters and bodies."""
    if error.status_code >= _SERVER_ERROR:
        return _unexpected(request, error)
    code = str(error.status_code)
    message = error.detail
    if error.status_code == _TOO_LARGE:
        handler = request.route_handler
        code = "REQUEST_TOO_LARGE"
        message = f"The body is larger than {handler.resolve_request_max_body_size():,} bytes."
    details: dict[str, object] = {}
    extra = cast("object", error.extra)
    if isinstance(error, ValidationException) and isinstance(extra, list):
        given = [
            cast("dict[str, str]", e) for e in cast("list[object]", extra) if isinstance(e, dict)
        ]
        problems = [
            {
                "path": _INDEX.sub(r"[\1]", e.get("key", "body")),
                "message": e.get("message", "").removeprefix("Value error, "),
            }
            for e in given
        ]
        details = {"errors": problems}
        message = "Validation error: " + ", ".join(f"{p['path']}: {p['message']}" for p in problems)
        if any(e.get("source") != "path" for e in given):
            code = "GENERIC_VALIDATION"
    return refusal(error.status_code, code, message, details=details, headers=error.headers)


def _unavailable(request: AnyRequest, error: Exception) -> Response[bytes]:
    identity = request_id(cast("Mapping[str, Any]", request.scope))
    log.warning("request.unavailable", request_id=identity, error=type(error).__name__)
    return refusal(
        503,
        "DATABASE_UNAVAILABLE",
        "The database does not answer. Repeat the request in a moment.",
        headers={"retry-after": "2"},
    )


def _unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    identity = request_id(cast("Mapping[str, Any]", request.scope))
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    # Only the kind and the place: an exception's text may quote a prompt.
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "unknown"
    log.error("request.failed", request_id=identity, error=type(error).__name__, at=place)
    return refusal(
        _SERVER_ERROR,
        "INTERNAL_SERVER_ERROR",
        f"Something went wrong on our side; request id {identity}.",
    )


HANDLERS: dict[type[Exception], Callable[[AnyRequest, Any], Response[bytes]]] = {
    RequestError: _refused,
    HTTPException: _framework,
    DatabaseUnavailableError: _unavailable,
    psycopg.OperationalError: _unavailable,
    psycopg.InterfaceError: _unavailable,
    PoolTimeout: _unavailable,
    Exception: _unexpected,
}
