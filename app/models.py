"""What the ``model`` of a request means: a resource by its name, or by the model that it is.

Programs written for OpenAI name models, not resources. So a name means the resource of that name;
else the oldest resource of that model; else a resource that is made for it, on the oldest connection
that lists the model as allowed. Nothing is made for a caller that is confined to some resources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from app import connections, resources
from app.db import Connection, Query
from app.resources import Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    name: str
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _ConnectionId:
    connection_id: UUID


_model_resources = Query("models", "model_resources", _Named)
_model_connection = Query("models", "model_connection", _ConnectionId)


async def resolve(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    names: Sequence[str],
    allowed: Sequence[UUID] | None,
) -> dict[str, Resource]:
    """The resources that names mean; those that mean none are absent.

    ``allowed``: resources that the caller may use, which are preferred; None: every one.
    """
    found: dict[str, Resource] = {}
    for row in await _model_resources.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        names=list(names),
        resource_ids=None if allowed is None else list(allowed),
    ):
        resource = await resources.get(
            conn,
            workspace_id=workspace_id,
            environment_id=environment_id,
            resource_id=row.resource_id,
        )
        if resource is not None:
            found[row.name] = resource
    return found


async def make(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, name: str
) -> Resource | None:
    """The resource of a model that a connection allows, made if need be; None: none allows it.

    Needs a transaction: it locks the connection, so that two who ask at once get the same one.
    """
    connection = await _model_connection.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, model=name
    )
    if connection is None:
        return None
    await connections.lock(conn, workspace_id=workspace_id, connection_id=connection.connection_id)
    known = await resolve(
        conn, workspace_id=workspace_id, environment_id=environment_id, names=[name], allowed=None
    )
    if name in known:
        return known[name]
    resource_id = await resources.create(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        connection_id=connection.connection_id,
        name=name,
        model=name,
        description="Made for a batch that named this model.",
    )
    return await resources.get(
        conn, workspace_id=workspace_id, environment_id=environment_id, resource_id=resource_id
    )
