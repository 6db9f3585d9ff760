"""Users, the workspaces that they are members of, and the environments of these.

A user is known by issuer and subject; what else a token says of them is for people to read.
Workspaces and environments are deleted by letting nobody enter any more: their history stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app.access import Claims, Role
from app.db import Connection, NoRow, Query
from app.errors import ConflictError, NotFoundError
from app.ids import uuid7


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A person."""

    user_id: UUID
    issuer: str
    subject: str
    name: str | None
    first_name: str | None
    last_name: str | None
    username: str | None
    email: str | None
    email_verified: bool
    picture_url: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a user may do in a workspace, and whether it has the environment in question."""

    role: Role
    has_environment: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A user in a workspace."""

    workspace_id: UUID
    user_id: UUID
    role: Role
    added_at: datetime
    added_by: UUID | None
    name: str | None
    email: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A tenant; ``role``: what the user who asked may do there."""

    workspace_id: UUID
    name: str
    description: str | None
    created_at: datetime
    updated_at: datetime
    role: Role | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A stage of a workspace, as people see it."""

    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An environment as an operator sees it; a workspace may have none."""

    workspace_id: UUID
    workspace: str
    environment_id: UUID | None
    environment: str | None
    api_keys: int
    members: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Count:
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    locked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _UserId:
    user_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _EnvironmentId:
    environment_id: UUID


_user_known = Query("workspaces", "user_known", User)
_user_seen = Query("workspaces", "user_seen", User)
_user_of_workspace = Query("workspaces", "user_of_workspace", User)
_users_near = Query("workspaces", "users_near", User)
_users_known = Query("workspaces", "users_known", _UserId)
_membership = Query("workspaces", "membership", Membership)
_members = Query("workspaces", "members", Member)
_member_add = Query("workspaces", "member_add", NoRow)
_member_set_role = Query("workspaces", "member_set_role", NoRow)
_member_remove = Query("workspaces", "member_remove", NoRow)
_owners = Query("workspaces", "owners", _Count)
_workspace_lock = Query("workspaces", "workspace_lock", _Locked)
_workspaces_of = Query("workspaces", "workspaces_of", Workspace)
_workspace_get = Query("workspaces", "workspace_get", Workspace)
_workspaces_all = Query("workspaces", "workspaces_all", Place)
_workspace_change = Query("workspaces", "workspace_change", NoRow)
_workspace_delete = Query("workspaces", "workspace_delete", NoRow)
_environments = Query("workspaces", "environments", Environment)
_environment_full = Query("workspaces", "environment_full", Environment)
_environments_lock = Query("workspaces", "environments_lock", _EnvironmentId)
_environment_hold = Query("workspaces", "environment_hold", _Locked)
_unfinished_batches = Query("workspaces", "unfinished_batches", _Count)
_environment_change = Query("workspaces", "environment_change", NoRow)
_environments_delete = Query("workspaces", "environments_delete", NoRow)


# Users --------------------------------------------------------------------------------------------


async def user_seen(conn: Connection, *, claims: Claims) -> User:
    """The user of whom a verified token tells, made at first sight."""
    said: dict[str, object] = {name: getattr(claims, name) for name in claims.__slots__}
    known = await _user_known.one_or_none(conn, **said)
    return known or await _user_seen.one(conn, user_id=uuid7(), **said)


async def creator(
    conn: Connection, *, workspace_id: UUID, batch_id: UUID, user_id: UUID
) -> User | None:
    """The user who created a batch of a workspace."""
    return await _user_of_workspace.one_or_none(
        conn, workspace_id=workspace_id, batch_id=batch_id, user_id=user_id
    )


async def users_near(
    conn: Connection, *, user_id: UUID, workspace_id: UUID | None, most: int
) -> list[User]:
    """Those with whom a user shares a workspace, or this one of theirs."""
    return await _users_near.all(conn, user_id=user_id, workspace_id=workspace_id, most=most)


# Members ------------------------------------------------------------------------------------------


async def membership(
    conn: Connection, *, workspace_id: UUID, user_id: UUID, environment_id: UUID | None
) -> Membership | None:
    """What a user may do in a workspace; None: nothing, or there is no such workspace."""
    return await _membership.one_or_none(
        conn, workspace_id=workspace_id, user_id=user_id, environment_id=environment_id
    )


async def members(conn: Connection, *, workspace_id: UUID) -> list[Member]:
    """The members in the order of their admission."""
    return await _members.all(conn, workspace_id=workspace_id)


async def admit(
    conn: Connection,
    *,
    workspace_id: UUID,
    user_ids: Sequence[UUID],
    role: Role,
    by: UUID | None,
) -> None:
    """Make users members; those who are keep their role. Raises NotFoundError naming the unknown."""
    await _lock(conn, workspace_id)
    known = {row.user_id for row in await _users_known.all(conn, user_ids=list(user_ids))}
    missing = sorted(str(each) for each in user_ids if each not in known)
    if missing:
        raise NotFoundError(
            f"Users not found: {', '.join(missing[:20])}. A user exists once they have called"
            " with a token.",
            code="USER_NOT_FOUND",
        )
    for user_id in sorted(known):
        await _member_add.run(
            conn, workspace_id=workspace_id, user_id=user_id, role=role, added_by=by
        )


async def set_role(conn: Connection, *, workspace_id: UUID, user_id: UUID, role: Role) -> None:
    """Change what a member may do. Raises NotFoundError, or ConflictError for the last owner."""
    await _lock(conn, workspace_id)
    if not await _member_set_role.run(conn, workspace_id=workspace_id, user_id=user_id, role=role):
        raise _no_member(user_id)
    await _require_an_owner(conn, workspace_id)


async def remove(conn: Connection, *, workspace_id: UUID, user_ids: Sequence[UUID]) -> None:
    """End memberships. Raises NotFoundError, or ConflictError when no owner would be left."""
    await _lock(conn, workspace_id)
    for user_id in sorted(set(user_ids)):
        if not await _member_remove.run(conn, workspace_id=workspace_id, user_id=user_id):
            raise _no_member(user_id)
    await _require_an_owner(conn, workspace_id)


def _no_member(user_id: UUID) -> NotFoundError:
    return NotFoundError(f"User {user_id} is no member of this workspace", code="USER_NOT_FOUND")


async def _require_an_owner(conn: Connection, workspace_id: UUID) -> None:
    if not (await _owners.one(conn, workspace_id=workspace_id)).count:
        raise ConflictError(
            "A workspace needs an owner; make somebody else one first.",
            code="WORKSPACE_NEEDS_OWNER",
        )


# Workspaces ---------------------------------------------------------------------------------------


async def of_user(conn: Connection, *, user_id: UUID) -> list[Workspace]:
    """The workspaces that a user may enter, oldest first."""
    return await _workspaces_of.all(conn, user_id=user_id)


async def get(conn: Connection, *, workspace_id: UUID) -> Workspace | None:
    """A workspace, or None."""
    return await _workspace_get.one_or_none(conn, workspace_id=workspace_id)


async def places(conn: Connection) -> list[Place]:
    """Every workspace and environment, for the operator of the database."""
    return await _workspaces_all.all(conn)


async def change(
    conn: Connection, *, workspace_id: UUID, name: str, description: str | None
) -> None:
    """Rename a workspace."""
    await _workspace_change.run(conn, workspace_id=workspace_id, name=name, description=description)


async def lock(conn: Connection, *, workspace_id: UUID) -> None:
    """One change of a workspace at a time, until the commit. Raises NotFoundError."""
    await _lock(conn, workspace_id)


async def delete(conn: Connection, *, workspace_id: UUID) -> None:
    """Let nobody enter a workspace any more. Raises ConflictError while batches are unfinished."""
    await _lock(conn, workspace_id)
    await _end(conn, workspace_id, None)
    await _workspace_delete.run(conn, workspace_id=workspace_id)


async def _lock(conn: Connection, workspace_id: UUID) -> None:
    if await _workspace_lock.one_or_none(conn, workspace_id=workspace_id) is None:
        raise NotFoundError(f"Workspace {workspace_id} not found", code="WORKSPACE_NOT_FOUND")


# Environments -------------------------------------------------------------------------------------


async def environments(conn: Connection, *, workspace_id: UUID) -> list[Environment]:
    """The environments of a workspace, oldest first."""
    return await _environments.all(conn, workspace_id=workspace_id)


async def environment(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID
) -> Environment | None:
    """An environment, or None."""
    return await _environment_full.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id
    )


async def hold_environment(conn: Connection, *, workspace_id: UUID, environment_id: UUID) -> None:
    """Keep an environment from being deleted until the commit. Raises NotFoundError."""
    held = await _environment_hold.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id
    )
    if held is None:
        raise no_environment(environment_id)


async def change_environment(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    name: str,
    description: str | None,
) -> None:
    """Rename an environment."""
    await _environment_change.run(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        name=name,
        description=description,
    )


async def delete_environment(conn: Connection, *, workspace_id: UUID, environment_id: UUID) -> None:
    """Let nobody enter an environment any more. Raises ConflictError while batches are unfinished."""
    await _lock(conn, workspace_id)
    await _end(conn, workspace_id, environment_id)


async def _end(conn: Connection, workspace_id: UUID, environment_id: UUID | None) -> None:
    """End one environment, or all: locked first, so that no batch is being made there."""
    held = await _environments_lock.all(
        conn, workspace_id=workspace_id, environment_id=environment_id
    )
    ids = [row.environment_id for row in held]
    if environment_id is not None and not ids:
        raise no_environment(environment_id)
    open_ones = await _unfinished_batches.one(conn, workspace_id=workspace_id, environment_ids=ids)
    if open_ones.count:
        raise ConflictError(
            f"{open_ones.count} batches are not finished; cancel them, or wait for them.",
            code="BATCHES_NOT_FINISHED",
            details={"batches": open_ones.count},
        )
    await _environments_delete.run(conn, workspace_id=workspace_id, environment_ids=ids)


def no_environment(environment_id: UUID) -> NotFoundError:
    """The refusal of an environment that is not there."""
    return NotFoundError(f"Environment {environment_id} not found", code="ENVIRONMENT_NOT_FOUND")
