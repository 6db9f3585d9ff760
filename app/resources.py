"""Resources: named models on connections, their alternates, and what becomes of both.

An *alternate* is another model of a resource: a fallback, a secondary model, the target of a routing
rule. It is a resource of its own that nobody can name, owned by the first: so its calls are claimed
in its own line and counted by the limits of its own connection and model, and what is learned of that
model is shared. It has no limits of its own and asks with its owner's arguments and time limit. Who
may use a resource may use its alternates. One that is taken off the lists stays while its owner does:
items may be on their way to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from psycopg.types.json import Jsonb

from app import api_keys, capacity, connections, queue, routing
from app.capacity import Amount
from app.db import Connection, NoRow, Query
from app.errors import ConflictError, NotFoundError
from app.ids import uuid7

_SHOWN = 20

#: After which outcomes the next model is asked where nobody says otherwise: when the tries are used
#: up, or the provider does not let this account, model or address in. See ``fallback_of``.
FALLBACK_ON: Final[Mapping[str, object]] = MappingProxyType(
    {
        "exhausted": True,
        "statusCodes": [401, 402, 403, 404, 405],
        "errorCodes": ["bad_url", "redirect", "MODEL_NOT_ALLOWED"],
        "throttledMs": None,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAt:
    """A model on a connection."""

    model: str
    connection_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A named model on a connection, or (``owner_id`` is not None) an alternate of one.

    ``most_tokens``: the smallest limit of input tokens above it; a longer prompt can never be sent.
    """

    workspace_id: UUID
    resource_id: UUID
    environment_id: UUID
    connection_id: UUID
    name: str
    description: str | None
    model: str
    default_args: dict[str, Any]
    capacity: list[dict[str, Any]]
    enforce_capacity: bool
    timeout_ms: int | None
    concurrency: int | None
    created_at: datetime
    updated_at: datetime
    owner_id: UUID | None
    use_fallback: bool
    fallback_ids: list[UUID]
    fallback_on: dict[str, Any]
    secondary_ids: list[UUID]
    routing: dict[str, Any] | None
    created_by: UUID | None
    updated_by: UUID | None
    provider: str
    most_tokens: int | None

    @property
    def at(self) -> ModelAt:
        """Its model."""
        return ModelAt(model=self.model, connection_id=self.connection_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The other models of a resource. ``targets``: those that the rules of ``routing`` name."""

    use_fallback: bool = True
    fallbacks: Sequence[ModelAt] = ()
    fallback_on: Mapping[str, object] = field(default_factory=lambda: FALLBACK_ON)
    secondary: Sequence[ModelAt] = ()
    routing: Mapping[str, object] | None = None
    targets: Sequence[ModelAt] = ()

    @property
    def models(self) -> list[ModelAt]:
        """All of them, each once."""
        return list(dict.fromkeys((*self.fallbacks, *self.secondary, *self.targets)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Id:
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routing:
    resource_id: UUID
    routing: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    resource_id: UUID
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    resource_id: UUID
    connection_id: UUID
    model_scope_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alternate:
    resource_id: UUID
    owner_id: UUID
    owner_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchId:
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScopeId:
    scope_id: UUID


_resource_insert = Query("resources", "resource_insert", NoRow)
_resource_state_insert = Query("resources", "resource_state_insert", NoRow)
_resource_get = Query("resources", "resource_get", Resource)
_resource_named = Query("resources", "resource_named", Resource)
_resources_page = Query("resources", "resources_page", Resource)
_resource_alternates = Query("resources", "resource_alternates", Resource)
_resources_lock = Query("resources", "resources_lock", _Id)
_resources_hold = Query("resources", "resources_hold", _Id)
_resources_pin = Query("resources", "resources_pin", _Id)
_resource_change = Query("resources", "resource_change", NoRow)
_alternates_touch = Query("resources", "alternates_touch", NoRow)
_alternates_drop = Query("resources", "alternates_drop", NoRow)
_routings = Query("resources", "routings", _Routing)
_resource_set_routing = Query("resources", "resource_set_routing", NoRow)
_resource_set_timeout = Query("resources", "resource_set_timeout", NoRow)
_resource_family = Query("resources", "resource_family", _Member)
_resources_on = Query("resources", "resources_on", _Named)
_alternates_on = Query("resources", "alternates_on", _Alternate)
_open_batches = Query("resources", "open_batches", _BatchId)
_scopes_close = Query("resources", "scopes_close", _ScopeId)
_resources_delete = Query("resources", "resources_delete", NoRow)
_resource_states_delete = Query("resources", "resource_states_delete", NoRow)
_ready_delete = Query("resources", "ready_delete", NoRow)
_scopes_delete = Query("resources", "scopes_delete", NoRow)


async def create(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    connection_id: UUID,
    name: str,
    model: str,
    description: str | None = None,
    default_args: Mapping[str, object] | None = None,
    capacity_entries: Sequence[Mapping[str, object]] = (),
    amounts: Sequence[Amount] = (),
    enforce_capacity: bool = True,
    timeout_ms: int | None = None,
    concurrency: int | None = None,
    choices: Choices | None = None,
    created_by: UUID | None = None,
) -> UUID:
    """A new model on a connection; its id.

    What is learned about the provider belongs to the model on the connection, so resources of the
    same model share it.
    """
    others = choices.models if choices is not None else []
    await connections.lock_rows(
        conn,
        workspace_id=workspace_id,
        connection_ids=[connection_id, *(other.connection_id for other in others)],
    )
    at = ModelAt(model=model, connection_id=connection_id)
    resource_id = await _insert(
        conn,
        at,
        workspace_id=workspace_id,
        environment_id=environment_id,
        name=name,
        description=description,
        default_args=default_args or {},
        capacity_entries=capacity_entries,
        amounts=amounts if enforce_capacity else (),
        enforce_capacity=enforce_capacity,
        timeout_ms=timeout_ms,
        concurrency=concurrency,
        created_by=created_by,
    )
    if choices is not None:
        made = await get(
            conn,
            workspace_id=workspace_id,
            environment_id=environment_id,
            resource_id=resource_id,
        )
        assert made is not None
        await _write(conn, made, choices, updated_by=None)
    return resource_id


async def _insert(
    conn: Connection,
    at: ModelAt,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    name: str,
    description: str | None = None,
    default_args: Mapping[str, object],
    capacity_entries: Sequence[Mapping[str, object]] = (),
    amounts: Sequence[Amount] = (),
    enforce_capacity: bool = True,
    timeout_ms: int | None = None,
    concurrency: int | None = None,
    owner_id: UUID | None = None,
    created_by: UUID | None = None,
) -> UUID:
    """A row with its scope, on a connection that is locked; its id."""
    resource_id = uuid7()
    await _resource_insert.run(
        conn,
        workspace_id=workspace_id,
        resource_id=resource_id,
        environment_id=environment_id,
        connection_id=at.connection_id,
        name=name,
        description=description,
        model=at.model,
        default_args=Jsonb(dict(default_args)),
        capacity=Jsonb(list(capacity_entries)),
        enforce_capacity=enforce_capacity,
        timeout_ms=timeout_ms,
        concurrency=concurrency,
        model_scope_id=await connections.model_scope(
            conn, workspace_id=workspace_id, connection_id=at.connection_id, model=at.model
        ),
        owner_id=owner_id,
        created_by=created_by,
    )
    await _resource_state_insert.run(conn, workspace_id=workspace_id, resource_id=resource_id)
    await capacity.open_scope(
        conn, workspace_id=workspace_id, scope_id=resource_id, kind="resource", amounts=amounts
    )
    return resource_id


async def get(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, resource_id: UUID
) -> Resource | None:
    """A resource, or None; never an alternate."""
    return await _resource_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, resource_id=resource_id
    )


async def named(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, name: str
) -> Resource | None:
    """A resource by its name, or None; never an alternate."""
    return await _resource_named.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, name=name
    )


async def page(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    after: UUID | None,
    connection_id: UUID | None,
    name: str | None,
    among: Sequence[UUID] | None,
    most: int,
) -> list[Resource]:
    """Resources of an environment, oldest first, those after a given one.

    ``among``: only these; None: all. Their ``most_tokens`` is not looked up.
    """
    return await _resources_page.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        after=after,
        connection_id=connection_id,
        name=name,
        among=None if among is None else list(among),
        most=most,
    )


async def alternates(
    conn: Connection, *, workspace_id: UUID, owner_ids: Iterable[UUID]
) -> list[Resource]:
    """All alternates of some resources, those that are on no list any more included."""
    return await _resource_alternates.all(
        conn, workspace_id=workspace_id, owner_ids=list(owner_ids)
    )


async def pin(conn: Connection, *, workspace_id: UUID, resource_ids: Iterable[UUID]) -> None:
    """Keep resources from being deleted until the commit. Raises NotFoundError naming those gone."""
    wanted = sorted(set(resource_ids))
    rows = await _resources_pin.all(conn, workspace_id=workspace_id, resource_ids=wanted)
    gone = sorted(str(i) for i in set(wanted) - {row.resource_id for row in rows})
    if gone:
        raise NotFoundError(
            f"AI Resource not found: {', '.join(gone[:_SHOWN])}",
            code="AI_RESOURCE_NOT_FOUND",
            details={"resources": gone[:100]},
        )


async def lock(
    conn: Connection,
    *,
    workspace_id: UUID,
    resource_id: UUID,
    connection_ids: Iterable[UUID] = (),
) -> None:
    """Keep claims from a resource, and others from changing it, until the commit.

    ``connection_ids``: connections on which the change will name models.
    """
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=resource_id)
    await connections.lock_rows(
        conn, workspace_id=workspace_id, connection_ids=sorted(set(connection_ids))
    )
    await _resources_lock.all(conn, workspace_id=workspace_id, resource_ids=[resource_id])


async def change(
    conn: Connection,
    *,
    held: Resource,
    to: Resource,
    choices: Choices | None = None,
    amounts: Sequence[Amount] | None = None,
    updated_by: UUID | None = None,
) -> list[UUID]:
    """Change a resource that is locked, effective at the next claim; the resources to ring for.

    ``choices``: its alternates from now on; batches that were created before know only those they
    found. ``amounts``: its limits from now on, unless it does not enforce them. None: as they are.
    """
    await _write(conn, to, choices, updated_by=updated_by)
    if amounts is not None:
        return await capacity.set_limits(
            conn,
            workspace_id=to.workspace_id,
            scope_id=to.resource_id,
            amounts=amounts if to.enforce_capacity else (),
        )
    if held.at != to.at:
        return await capacity.reattach(conn, workspace_id=to.workspace_id, scope_id=to.resource_id)
    if to.concurrency != held.concurrency:
        return await capacity.wake(conn, workspace_id=to.workspace_id, scope_id=to.resource_id)
    return []


async def _write(
    conn: Connection, to: Resource, choices: Choices | None, *, updated_by: UUID | None
) -> None:
    if choices is not None:
        ids = await _ensure_alternates(conn, to, choices.models)
        to = replace(
            to,
            use_fallback=choices.use_fallback,
            fallback_ids=[ids[each] for each in choices.fallbacks],
            fallback_on=dict(choices.fallback_on),
            secondary_ids=[ids[each] for each in choices.secondary],
            routing=None if choices.routing is None else dict(choices.routing),
        )
    await _resource_change.run(
        conn,
        workspace_id=to.workspace_id,
        resource_id=to.resource_id,
        name=to.name,
        description=to.description,
        connection_id=to.connection_id,
        model=to.model,
        model_scope_id=await connections.model_scope(
            conn, workspace_id=to.workspace_id, connection_id=to.connection_id, model=to.model
        ),
        default_args=Jsonb(to.default_args),
        capacity=Jsonb(to.capacity),
        enforce_capacity=to.enforce_capacity,
        timeout_ms=to.timeout_ms,
        concurrency=to.concurrency,
        use_fallback=to.use_fallback,
        fallback_ids=to.fallback_ids,
        fallback_on=Jsonb(to.fallback_on),
        secondary_ids=to.secondary_ids,
        routing=None if to.routing is None else Jsonb(to.routing),
        updated_by=updated_by,
    )
    await _alternates_touch.run(conn, workspace_id=to.workspace_id, owner_id=to.resource_id)


async def _ensure_alternates(
    conn: Connection, owner: Resource, models: Sequence[ModelAt]
) -> dict[ModelAt, UUID]:
    known = {
        each.at: each.resource_id
        for each in await alternates(
            conn, workspace_id=owner.workspace_id, owner_ids=[owner.resource_id]
        )
    }
    for at in models:
        if at not in known:
            known[at] = await _insert(
                conn,
                at,
                workspace_id=owner.workspace_id,
                environment_id=owner.environment_id,
                name=f"{owner.name}: {at.model}",
                default_args={},
                owner_id=owner.resource_id,
            )
    return known


async def set_timeout(
    conn: Connection, *, workspace_id: UUID, resource_id: UUID, timeout_ms: int | None
) -> None:
    """Bound a resource's calls; None: as its connection says."""
    await _resource_set_timeout.run(
        conn, workspace_id=workspace_id, resource_id=resource_id, timeout_ms=timeout_ms
    )


# Deletion -----------------------------------------------------------------------------------------


async def delete(
    conn: Connection, *, workspace_id: UUID, resource_id: UUID, force: bool
) -> list[UUID]:
    """Remove a resource and strip it from the keys' allowlists; the batches that it cancelled.

    Batches of which something is still to be done are cancelled with ``force``; without it they are
    named by a ConflictError and nothing changes. What was asked stays readable with its batches.
    """
    return await _delete(conn, workspace_id=workspace_id, resource_ids=[resource_id], force=force)


async def delete_connection(
    conn: Connection, *, workspace_id: UUID, connection_id: UUID, force: bool
) -> list[UUID]:
    """Remove a connection with all resources on it; the batches that it cancelled.

    Resources elsewhere that fall back or route to it lose those models with ``force``, and the rules
    that name them; without it they are named by a ConflictError, as open batches are.
    """
    own = await _resources_on.all(conn, workspace_id=workspace_id, connection_id=connection_id)
    guests = await _alternates_on.all(conn, workspace_id=workspace_id, connection_id=connection_id)
    if guests and not force:
        names = sorted({guest.owner_name for guest in guests})
        raise ConflictError(
            f"Other resources fall back or route to this connection: {', '.join(names[:_SHOWN])}. "
            "Take it out of them first, or repeat with ?force=true to have that done.",
            code="AI_CONNECTION_IN_USE",
            details={"resources": sorted({str(guest.owner_id) for guest in guests})},
        )
    cancelled = await _delete(
        conn,
        workspace_id=workspace_id,
        resource_ids=[row.resource_id for row in own],
        force=force,
        guests=guests,
        connection_id=connection_id,
    )
    await connections.delete(conn, workspace_id=workspace_id, connection_id=connection_id)
    await _scopes_delete.run(conn, workspace_id=workspace_id, scope_ids=[connection_id])
    return cancelled


async def _delete(
    conn: Connection,
    *,
    workspace_id: UUID,
    resource_ids: Sequence[UUID],
    force: bool,
    guests: Sequence[_Alternate] = (),
    connection_id: UUID | None = None,
) -> list[UUID]:
    """Locks in the order of sql/README.md: mutexes, connections, resources, keys, then batches."""
    guest_ids = [guest.resource_id for guest in guests]
    family = await _resource_family.all(
        conn, workspace_id=workspace_id, resource_ids=[*resource_ids, *guest_ids]
    )
    ids = [member.resource_id for member in family]
    scope_ids = {*ids, *(member.model_scope_id for member in family)}
    connection_ids = {member.connection_id for member in family}
    if connection_id is not None:
        scope_ids.add(connection_id)
        connection_ids.add(connection_id)
    await _scopes_close.all(conn, workspace_id=workspace_id, scope_ids=list(scope_ids))
    await connections.lock_rows(
        conn, workspace_id=workspace_id, connection_ids=list(connection_ids)
    )
    owner_ids = [guest.owner_id for guest in guests]
    await _resources_hold.all(conn, workspace_id=workspace_id, resource_ids=[*ids, *owner_ids])
    await api_keys.disallow(conn, workspace_id=workspace_id, resource_ids=list(resource_ids))
    cancelled = await _end_batches(conn, workspace_id=workspace_id, resource_ids=ids, force=force)
    if guests:
        assert connection_id is not None
        await _drop(conn, workspace_id=workspace_id, guests=guests, connection_id=connection_id)
    await _ready_delete.run(conn, workspace_id=workspace_id, resource_ids=ids)
    await _resource_states_delete.run(conn, workspace_id=workspace_id, resource_ids=ids)
    await _resources_delete.run(
        conn, workspace_id=workspace_id, resource_ids=[*resource_ids, *guest_ids]
    )
    await _scopes_delete.run(conn, workspace_id=workspace_id, scope_ids=list(scope_ids))
    return cancelled


async def _end_batches(
    conn: Connection, *, workspace_id: UUID, resource_ids: Sequence[UUID], force: bool
) -> list[UUID]:
    rows = await _open_batches.all(conn, workspace_id=workspace_id, resource_ids=list(resource_ids))
    found = [row.batch_id for row in rows]
    if found and not force:
        shown = ", ".join(str(batch_id) for batch_id in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConflictError(
            f"Batches are still to be done: {shown}{more}. Wait for them, cancel them, or repeat "
            "with ?force=true to have them cancelled.",
            code="AI_RESOURCE_IN_USE",
            details={"batches": [str(batch_id) for batch_id in found[:100]]},
        )
    for batch_id in found:
        await queue.cancel(conn, workspace_id=workspace_id, batch_id=batch_id)
    return found


async def _drop(
    conn: Connection, *, workspace_id: UUID, guests: Sequence[_Alternate], connection_id: UUID
) -> None:
    """Take alternates that are to be deleted out of their owners' lists and rules."""
    await _alternates_drop.run(
        conn,
        workspace_id=workspace_id,
        alternate_ids=[guest.resource_id for guest in guests],
        owner_ids=[guest.owner_id for guest in guests],
    )
    owners = await _routings.all(
        conn, workspace_id=workspace_id, resource_ids=[guest.owner_id for guest in guests]
    )
    for owner in owners:
        await _resource_set_routing.run(
            conn,
            workspace_id=workspace_id,
            resource_id=owner.resource_id,
            routing=Jsonb(routing.without(owner.routing, connection_id)),
        )
