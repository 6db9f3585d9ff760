"""Who is calling, and what they may use.

``authenticate`` guards every route but those of health and documentation. The key decides the
workspace: handlers bind their statements to the caller's, never to the path's, and the guard has
refused a path that names another one in words that do not tell whether it exists.
"""

import asyncio
from collections.abc import Iterable
from typing import Annotated, Any
from uuid import UUID

from litestar.connection import ASGIConnection
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler
from litestar.params import PathParameter, SkipValidation

from app import batches, tenants
from app.api.context import Context
from app.api.errors import AnyRequest
from app.batches import Batch
from app.db import CONNECTION_ERRORS, Connection
from app.errors import ForbiddenError, NotFoundError, RequestError, UnauthenticatedError
from app.tenants import ApiKey

_BEARER = "bearer "
_NOTED_S = 60.0

Caller = NamedDependency[SkipValidation[ApiKey]]


async def authenticate(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Find the caller's key and refuse a path that is not in its environment. Guards routers."""
    context: Context = connection.app.state.context
    value = connection.headers.get("x-api-key")
    if value is None:
        given = connection.headers.get("authorization", "")
        value = given[len(_BEARER) :] if given.lower().startswith(_BEARER) else ""
    value = value.strip()
    if not value:
        raise UnauthenticatedError(
            "Send an API key: the header 'x-api-key: slk_…' or 'Authorization: Bearer slk_…'."
        )
    async with context.db.connection() as conn:
        key = await tenants.api_key(conn, value=value)
        if key is None:
            raise UnauthenticatedError("This API key is unknown, disabled or expired.")
        await _note_use(context, conn, key)
    for name, own in (("workspaceId", key.workspace_id), ("environmentId", key.environment_id)):
        asked = connection.path_params.get(name)
        if asked is not None and _uuid(name, asked) != own:
            raise ForbiddenError(
                "This API key does not open that workspace and environment.",
                code="NOT_AUTHORIZED",
            )
    connection.scope["state"]["api_key"] = key


def credential(request: AnyRequest) -> tuple[str | None, str | None]:
    """What a request shows of who sends it, for those who ask about many of them together."""
    return request.headers.get("x-api-key"), request.headers.get("authorization")


async def caller(request: AnyRequest) -> ApiKey:
    """The key that the guard found."""
    return request.scope["state"]["api_key"]


async def tenant_caller(
    request: AnyRequest,
    workspace_id: Annotated[UUID, PathParameter(name="workspaceId", include_in_schema=False)],
    environment_id: Annotated[UUID, PathParameter(name="environmentId", include_in_schema=False)],
) -> ApiKey:
    """The same below a path with a tenant, which is the key's own."""
    key: ApiKey = request.scope["state"]["api_key"]
    assert (key.workspace_id, key.environment_id) == (workspace_id, environment_id)
    return key


def require_resources(key: ApiKey, resource_ids: Iterable[UUID]) -> None:
    """Refuse unless the key's allowlist has all of these; names those that it lacks."""
    lacking = sorted({str(r) for r in resource_ids if not key.may_use(r)})
    if lacking:
        raise ForbiddenError(
            f"This API key may not use the resources {', '.join(lacking[:20])}"
            + (f" and {len(lacking) - 20} more." if len(lacking) > 20 else "."),  # noqa: PLR2004 - as many as are named
            code="API_KEY_RESOURCE_NOT_AUTHORIZED",
            details={"resourceIds": lacking[:100]},
        )


def require_everything(key: ApiKey, doing: str) -> None:
    """Refuse a key that is confined to some resources: it must not widen its own reach."""
    if "*" not in key.resources:
        raise ForbiddenError(
            f"Only an API key for all resources (*) may {doing}.", code="NOT_AUTHORIZED"
        )


async def batch_for(conn: Connection, key: ApiKey, batch_id: UUID) -> Batch:
    """A batch that the caller may see. Raises NotFoundError or ForbiddenError."""
    batch = await batches.get(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        batch_id=batch_id,
    )
    if batch is None:
        raise NotFoundError(
            f"Completion Batch {batch_id} not found", code="COMPLETION_BATCH_NOT_FOUND"
        )
    if "*" not in key.resources:
        used = await batches.resource_ids_of(
            conn,
            workspace_id=key.workspace_id,
            batch_ids=[batch_id],
            reader_id=key.api_key_id,
        )
        require_resources(key, used.get(batch_id, ()))
    return batch


async def _note_use(context: Context, conn: Connection, key: ApiKey) -> None:
    now = asyncio.get_running_loop().time()
    if now - context.keys_noted.get(key.api_key_id, -_NOTED_S) < _NOTED_S:
        return
    context.keys_noted[key.api_key_id] = now
    try:
        await tenants.note_api_key_used(conn, key=key)
    except CONNECTION_ERRORS:
        del context.keys_noted[key.api_key_id]
        raise


def _uuid(name: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise RequestError(f"{name} is not a UUID.") from None
