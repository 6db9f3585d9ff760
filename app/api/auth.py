"""Who is calling, and whether they may: the one place that decides.

Every route names its action, a word out of ``app.access.ACTIONS``, where it is declared::

    @post("/completion-batch/{workspaceId:str}/{environmentId:str}", action="completion-batch:create", …)

and stands below a router with ``guards=[authenticate]``. A route that forgets either keeps the API from
starting (``require_declared``), and tests/test_tenant_walk.py tries every route with everybody who
must be refused. Besides an action a route may say ``ANYONE``: whoever has a valid key or token
(what they see is then the handler's business), or ``PUBLIC``: needs neither, such as health.

What a handler is given, by the name of its parameter:

``caller``    below ``/{workspaceId}/{environmentId}``: the key, whose own these are, or the user, a member of
              the workspace. On routes without them (``dependencies={"caller": Provide(caller)}``): a
              key only, since it alone knows its environment.
``visitor``   above environments: the user, or the key.

Handlers bind their statements to the caller's workspace and environment, never to the path's. A key
is refused a path that is not its own, and a user a workspace that is not theirs, in words that do
not tell whether it exists.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from uuid import UUID

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.params import PathParameter, SkipValidation

from app import access, api_keys, batches, workspaces
from app.access import Principal, Role
from app.api.context import Context
from app.api.errors import AnyRequest
from app.api.together import Together
from app.batches import Batch
from app.db import CONNECTION_ERRORS, Connection, Database
from app.errors import ForbiddenError, NotFoundError, RequestError, UnauthenticatedError
from app.workspaces import User

ANYONE: Final = "anyone"
PUBLIC: Final = "public"

_BEARER: Final = "bearer "
_NOTED_S: Final = 60.0
_PARTS_OF_A_TOKEN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who is calling: a key, or a user, with their role where the path names a workspace."""

    key: Principal | None = None
    user: User | None = None
    role: Role | None = None

    def may(self, action: str) -> bool:
        """Whether they may perform an action."""
        if self.key is not None:
            return self.key.may(action)
        if self.role is None:
            return action in access.ALONE
        return access.role_allows(self.role, action)

    def person(self, doing: str) -> User:
        """The user. Raises ForbiddenError for a key."""
        if self.user is None:
            raise ForbiddenError(
                f"Only a user may {doing}: an API key stays in its environment. Call with a token.",
                code="NOT_AUTHORIZED",
            )
        return self.user


Caller = NamedDependency[SkipValidation[Principal]]
Visiting = NamedDependency[SkipValidation[Visitor]]


async def authenticate(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """Find out who is calling and refuse what they may not. Guards routers."""
    context: Context = connection.app.state.context
    given = connection.headers.get("x-api-key")
    is_bearer = given is None
    if given is None:
        header = connection.headers.get("authorization", "")
        given = header[len(_BEARER) :] if header.lower().startswith(_BEARER) else ""
    value = given.strip()
    if not value:
        raise UnauthenticatedError(
            "Send an API key, 'x-api-key: slk_…' or 'Authorization: Bearer slk_…'"
            + (", or a user's token as Bearer." if context.issuer is not None else ".")
        )
    if is_bearer and context.issuer is not None and value.count(".") == _PARTS_OF_A_TOKEN - 1:
        visitor, principal = await _user(context, connection, value)
    else:
        visitor, principal = await _key(context, connection, value)
    action: str = handler.opt["action"]
    if action != ANYONE and not visitor.may(action):
        if visitor.user is not None and visitor.role is None:
            raise _no_environment()
        raise ForbiddenError(
            f"You are not authorized to perform '{action}' action on"
            f" '{action.partition(':')[0]}' resource",
            code="NOT_AUTHORIZED",
            details={"action": action},
        )
    connection.scope["state"]["visitor"] = visitor
    connection.scope["state"]["caller"] = principal


async def _key(
    context: Context, connection: ASGIConnection[Any, Any, Any, Any], value: str
) -> tuple[Visitor, Principal]:
    key = await context.keys.ask(value)
    if key is None:
        raise UnauthenticatedError("This API key is unknown, disabled or expired.")
    await _note_use(context, key)
    for name, own in (("workspaceId", key.workspace_id), ("environmentId", key.environment_id)):
        asked = _path_id(connection, name)
        if asked is not None and asked != own:
            raise ForbiddenError(
                "This API key does not open that workspace and environment.",
                code="NOT_AUTHORIZED",
            )
    return Visitor(key=key), key


def keys(db: Database) -> Together[str, Principal | None]:
    """Who calls with a key's value."""

    async def opened_by(value: str) -> Principal | None:
        async with db.connection() as conn:
            return await api_keys.opened_by(conn, value=value)

    return Together(opened_by)


def batches_by_id(db: Database) -> Together[tuple[UUID, UUID, UUID], Batch | None]:
    """A batch by its workspace, environment and id."""

    async def get(ids: tuple[UUID, UUID, UUID]) -> Batch | None:
        workspace_id, environment_id, batch_id = ids
        async with db.connection() as conn:
            return await batches.get(
                conn, workspace_id=workspace_id, environment_id=environment_id, batch_id=batch_id
            )

    return Together(get)


def credential(request: AnyRequest) -> tuple[str | None, str | None]:
    """What a request shows of who sends it, for those who ask about many of them together."""
    return request.headers.get("x-api-key"), request.headers.get("authorization")


async def _user(
    context: Context, connection: ASGIConnection[Any, Any, Any, Any], token: str
) -> tuple[Visitor, Principal | None]:
    assert context.issuer is not None
    claims = await context.issuer.verify(token)
    workspace_id = _path_id(connection, "workspaceId")
    environment_id = _path_id(connection, "environmentId")
    async with context.db.connection() as conn:
        user = await workspaces.user_seen(conn, claims=claims)
        if workspace_id is None:
            return Visitor(user=user), None
        found = await workspaces.membership(
            conn, workspace_id=workspace_id, user_id=user.user_id, environment_id=environment_id
        )
    if found is None:
        raise RequestError("You are not a member of this workspace.", code="WORKSPACE_NOT_MEMBER")
    visitor = Visitor(user=user, role=found.role)
    if environment_id is None:
        return visitor, None
    if not found.has_environment:
        raise workspaces.no_environment(environment_id)
    return visitor, Principal(
        workspace_id=workspace_id,
        environment_id=environment_id,
        name=user.name or user.username or user.email or user.subject,
        resources=("*",),
        user_id=user.user_id,
        role=found.role,
    )


async def visitor(request: AnyRequest) -> Visitor:
    """Whom the guard found."""
    return request.scope["state"]["visitor"]


async def caller(request: AnyRequest) -> Principal:
    """The key that the guard found, for paths without a tenant. Raises RequestError for users."""
    principal: Principal | None = request.scope["state"]["caller"]
    if principal is None:
        raise _no_environment()
    return principal


async def tenant_caller(
    request: AnyRequest,
    workspace_id: Annotated[UUID, PathParameter(name="workspaceId", include_in_schema=False)],
    environment_id: Annotated[UUID, PathParameter(name="environmentId", include_in_schema=False)],
) -> Principal:
    """Whom the guard found, below a path with a tenant, which is their own."""
    principal: Principal = request.scope["state"]["caller"]
    assert (principal.workspace_id, principal.environment_id) == (workspace_id, environment_id)
    return principal


def require_declared(app: Litestar) -> None:
    """Refuse to serve a route that does not say who may use it. Raises RuntimeError naming it."""
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            if not isinstance(handler, HTTPRouteHandler) or handler.http_methods == {"OPTIONS"}:
                continue
            action = handler.opt.get("action")
            if action == PUBLIC:
                continue
            if action != ANYONE and action not in access.ACTIONS:
                raise RuntimeError(f"{route.path}: action={action!r} is none of app.access.ACTIONS")
            guards: Sequence[object] = handler.resolve_guards()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - Litestar's
            if authenticate not in guards:
                raise RuntimeError(f"{route.path}: its router lacks guards=[authenticate]")


def require_resources(key: Principal, resource_ids: Iterable[UUID]) -> None:
    """Refuse unless the caller's allowlist has all of these; names those that it lacks."""
    lacking = sorted({str(r) for r in resource_ids if not key.may_use(r)})
    if lacking:
        raise ForbiddenError(
            f"This API key may not use the resources {', '.join(lacking[:20])}"
            + (f" and {len(lacking) - 20} more." if len(lacking) > 20 else "."),  # noqa: PLR2004 - as many as are named
            code="API_KEY_RESOURCE_NOT_AUTHORIZED",
            details={"resourceIds": lacking[:100]},
        )


def require_everything(key: Principal, doing: str) -> None:
    """Refuse a key that is confined to some resources: it must not widen its own reach."""
    if "*" not in key.resources:
        raise ForbiddenError(
            f"Only an API key for all resources (*) may {doing}.", code="NOT_AUTHORIZED"
        )


def require_grantable(key: Principal, permissions: Sequence[str]) -> None:
    """Refuse to hand out what the caller may not do themselves."""
    if not key.may_give(permissions):
        raise ForbiddenError(
            "An API key may not do more than whoever makes it or learns its value; give it fewer"
            " permissions, or ask an owner of the workspace.",
            code="NOT_AUTHORIZED",
        )


async def batch_for(conn: Connection, key: Principal, batch_id: UUID) -> Batch:
    """A batch that the caller may see. Raises NotFoundError or ForbiddenError."""
    batch = await batches.get(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        batch_id=batch_id,
    )
    if batch is None:
        raise _no_batch(batch_id)
    if "*" not in key.resources:
        await _require_visible(conn, key, batch_id)
    return batch


async def followed_batch(context: Context, key: Principal, batch_id: UUID) -> Batch:
    """The same, for callers who come by the thousand for one batch."""
    batch = await context.batches.ask((key.workspace_id, key.environment_id, batch_id))
    if batch is None:
        raise _no_batch(batch_id)
    if "*" not in key.resources:
        async with context.db.connection() as conn:
            await _require_visible(conn, key, batch_id)
    return batch


def _no_batch(batch_id: UUID) -> NotFoundError:
    return NotFoundError(
        f"Completion Batch {batch_id} not found", code="COMPLETION_BATCH_NOT_FOUND"
    )


async def _require_visible(conn: Connection, key: Principal, batch_id: UUID) -> None:
    used = await batches.resource_ids_of(
        conn,
        workspace_id=key.workspace_id,
        batch_ids=[batch_id],
        reader_id=key.api_key_id,
    )
    require_resources(key, used.get(batch_id, ()))


async def _note_use(context: Context, key: Principal) -> None:
    assert key.api_key_id is not None
    now = asyncio.get_running_loop().time()
    if now - context.keys_noted.get(key.api_key_id, -_NOTED_S) < _NOTED_S:
        return
    context.keys_noted[key.api_key_id] = now
    try:
        async with context.db.connection() as conn:
            await api_keys.note_used(conn, workspace_id=key.workspace_id, api_key_id=key.api_key_id)
    except CONNECTION_ERRORS:
        del context.keys_noted[key.api_key_id]
        raise


def _no_environment() -> RequestError:
    return RequestError(
        "The path names no environment, so call this with an API key, which belongs to one."
    )


def _path_id(connection: ASGIConnection[Any, Any, Any, Any], name: str) -> UUID | None:
    text = connection.path_params.get(name)
    if text is None:
        return None
    try:
        return UUID(text)
    except ValueError:
        raise RequestError(f"{name} is not a UUID.") from None
