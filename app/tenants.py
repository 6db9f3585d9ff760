"""Tenants: workspaces and their environments."""

from dataclasses import dataclass
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.ids import uuid7


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A stage of a workspace."""

    workspace_id: UUID
    environment_id: UUID
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    locked: str


_setup_lock = Query("tenants", "setup_lock", _Locked)
_workspace_insert = Query("tenants", "workspace_insert", NoRow)
_environment_insert = Query("tenants", "environment_insert", NoRow)
_environment_get = Query("tenants", "environment_get", Environment)
_environment_named = Query("tenants", "environment_named", Environment)


async def lock_setup(conn: Connection) -> None:
    """Wait for other processes that make the command line's own tenants, until the commit."""
    await _setup_lock.run(conn)


async def create_workspace(
    conn: Connection, *, name: str, environment: str, description: str | None = None
) -> Environment:
    """A new tenant with its first environment."""
    made = Environment(workspace_id=uuid7(), environment_id=uuid7(), name=environment)
    await _workspace_insert.run(
        conn, workspace_id=made.workspace_id, name=name, description=description
    )
    await _environment_insert.run(
        conn,
        workspace_id=made.workspace_id,
        environment_id=made.environment_id,
        name=environment,
        description=None,
    )
    return made


async def create_environment(
    conn: Connection, *, workspace_id: UUID, name: str, description: str | None = None
) -> UUID:
    """Another stage of a workspace; its id."""
    environment_id = uuid7()
    await _environment_insert.run(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        name=name,
        description=description,
    )
    return environment_id


async def environment(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID
) -> Environment | None:
    """An environment, or None."""
    return await _environment_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id
    )


async def environment_named(
    conn: Connection, *, workspace: str, environment: str
) -> Environment | None:
    """The oldest environment with these names: the command line's own."""
    return await _environment_named.one_or_none(conn, workspace=workspace, environment=environment)
