"""``/v1/workspace``, ``/v1/environment``, ``/v1/user`` and ``/v1/role``: what lies above environments.

Users do this. An API key sees its own workspace and environment and changes neither.
"""

from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, delete, get, post, put, route
from litestar.di import Provide
from litestar.params import Body, PathParameter, QueryParameter

from app import tenants, workspaces
from app.api import wire, wire_access
from app.api.auth import Visiting, Visitor, authenticate, visitor
from app.api.context import Given
from app.api.errors import AnyRequest, ErrorBody
from app.api.limited import CHANGING, MOST_BODY, Answer, answer, created, unique
from app.errors import ForbiddenError, NotFoundError, Problem, ValidationError
from app.log import Log
from app.workspaces import Environment, Workspace

log = Log("api")

_MOST_USERS: Final = 1000
_NAME_TAKEN: Final = "ENVIRONMENT_ALREADY_EXISTS"
_CHANGED: Final = "What is absent stays as it is. PUT and PATCH are the same."

WorkspaceId = Annotated[UUID, PathParameter(name="workspaceId")]
EnvironmentId = Annotated[UUID, PathParameter(name="environmentId")]
UserId = Annotated[UUID, PathParameter(name="userId")]


# Workspaces ---------------------------------------------------------------------------------------


@get(
    "/workspace",
    action="workspace:list",
    summary="List workspaces",
    description="Those of which the user is a member; of a key, its own.",
    responses={200: Answer(list[wire_access.WorkspaceBody], description="Workspaces")},
)
async def list_workspaces(context: Given, visitor: Visiting) -> Response[bytes]:
    async with context.db.connection() as conn:
        if visitor.user is not None:
            found = await workspaces.of_user(conn, user_id=visitor.user.user_id)
        else:
            assert visitor.key is not None
            own = await workspaces.get(conn, workspace_id=visitor.key.workspace_id)
            found = [] if own is None else [own]
    return answer([wire_access.workspace_body(each) for each in found])


@post(
    "/workspace",
    action="workspace:create",
    summary="Create a workspace",
    description="With its first environment. The user who makes it is its owner.",
    status_code=201,
    responses={
        201: Answer(wire_access.WorkspaceBody, description="The workspace"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        403: Answer(ErrorBody, description="Only the operator makes workspaces here"),
    },
)
async def create_workspace(
    context: Given, visitor: Visiting, data: Annotated[wire_access.WorkspaceCreate, Body()]
) -> Response[bytes]:
    user = visitor.person("create workspaces")
    if not context.settings.users_create_workspaces:
        raise ForbiddenError(
            "Here only the operator makes workspaces (SLUICE_USERS_CREATE_WORKSPACES); ask for one.",
            code="NOT_AUTHORIZED",
        )
    async with context.db.transaction() as conn:
        made = await tenants.create_workspace(
            conn, name=data.name, environment=data.environment, description=data.description
        )
        await workspaces.admit(
            conn,
            workspace_id=made.workspace_id,
            user_ids=[user.user_id],
            role="owner",
            by=user.user_id,
        )
        found = await workspaces.get(conn, workspace_id=made.workspace_id)
    assert found is not None
    log.info("workspace.created", workspace=made.workspace_id, by=user.user_id)
    return created(wire_access.workspace_body(found, role="owner"))


@get(
    "/workspace/{workspaceId:str}",
    action="workspace:get",
    summary="Read a workspace",
    responses={200: Answer(wire_access.WorkspaceBody, description="The workspace")},
)
async def read_workspace(
    context: Given, visitor: Visiting, workspace_id: WorkspaceId
) -> Response[bytes]:
    return answer(await _workspace_body(context, visitor, workspace_id))


@route(
    "/workspace/{workspaceId:str}",
    http_method=CHANGING,
    action="workspace:update",
    summary="Change a workspace",
    description=_CHANGED,
    status_code=200,
    responses={
        200: Answer(wire_access.WorkspaceBody, description="The workspace, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def change_workspace(
    request: AnyRequest, context: Given, visitor: Visiting, workspace_id: WorkspaceId
) -> Response[bytes]:
    visitor.person("change workspaces")
    wanted = wire.changes(wire_access.NamedPatch, wire.object_of(await request.body()))
    async with context.db.transaction() as conn:
        await workspaces.lock(conn, workspace_id=workspace_id)
        held = await workspaces.get(conn, workspace_id=workspace_id)
        assert held is not None
        name, description = wanted.applied({"name": held.name, "description": held.description})
        await workspaces.change(conn, workspace_id=workspace_id, name=name, description=description)
    return answer(await _workspace_body(context, visitor, workspace_id))


@delete(
    "/workspace/{workspaceId:str}",
    action="workspace:delete",
    summary="Delete a workspace",
    description="Nobody enters it any more, keys included; its history stays. Not while batches are"
    " unfinished.",
    status_code=204,
    responses={409: Answer(ErrorBody, description="Batches of it are not finished")},
)
async def delete_workspace(context: Given, visitor: Visiting, workspace_id: WorkspaceId) -> None:
    user = visitor.person("delete workspaces")
    async with context.db.transaction() as conn:
        await workspaces.delete(conn, workspace_id=workspace_id)
    log.info("workspace.deleted", workspace=workspace_id, by=user.user_id)


async def _workspace_body(
    context: Given, visitor: Visitor, workspace_id: UUID
) -> wire_access.WorkspaceBody:
    async with context.db.connection() as conn:
        found: Workspace | None = await workspaces.get(conn, workspace_id=workspace_id)
    if found is None:
        raise NotFoundError(f"Workspace {workspace_id} not found", code="WORKSPACE_NOT_FOUND")
    return wire_access.workspace_body(found, role=visitor.role)


# Members ------------------------------------------------------------------------------------------


@get(
    "/workspace/{workspaceId:str}/members",
    action="workspace-member:list",
    summary="List the members of a workspace",
    responses={200: Answer(list[wire_access.MemberBody], description="Members")},
)
async def list_members(
    context: Given, visitor: Visiting, workspace_id: WorkspaceId
) -> Response[bytes]:
    visitor.person("list members")
    return answer(await _members(context, workspace_id))


@put(
    "/workspace/{workspaceId:str}/members/{userId:str}/role",
    action="workspace-member:update",
    summary="Change a member's role",
    description="A workspace keeps at least one owner.",
    responses={
        200: Answer(list[wire_access.MemberBody], description="The members, as they are now"),
        404: Answer(ErrorBody, description="That user is no member"),
        409: Answer(ErrorBody, description="No owner would be left"),
    },
)
async def change_role(
    context: Given,
    visitor: Visiting,
    workspace_id: WorkspaceId,
    user_id: UserId,
    data: Annotated[wire_access.RoleChange, Body()],
) -> Response[bytes]:
    by = visitor.person("change members")
    async with context.db.transaction() as conn:
        await workspaces.set_role(conn, workspace_id=workspace_id, user_id=user_id, role=data.role)
    log.info("member.changed", workspace=workspace_id, user=user_id, role=data.role, by=by.user_id)
    return answer(await _members(context, workspace_id))


@post(
    "/workspace/{workspaceId:str}/assign",
    action="workspace-member:create",
    summary="Admit members",
    description="A user exists once they have called with a token, and finds their id at /v1/user/me."
    " Those who are members already keep their role.",
    status_code=200,
    responses={
        200: Answer(list[wire_access.MemberBody], description="The members, as they are now"),
        404: Answer(ErrorBody, description="There is no such user"),
    },
)
async def assign(
    context: Given,
    visitor: Visiting,
    workspace_id: WorkspaceId,
    data: Annotated[wire_access.Assignment, Body()],
) -> Response[bytes]:
    by = visitor.person("admit members")
    async with context.db.transaction() as conn:
        await workspaces.admit(
            conn,
            workspace_id=workspace_id,
            user_ids=data.user_ids,
            role=data.role,
            by=by.user_id,
        )
    log.info(
        "member.added",
        workspace=workspace_id,
        users=len(data.user_ids),
        role=data.role,
        by=by.user_id,
    )
    return answer(await _members(context, workspace_id))


@post(
    "/workspace/{workspaceId:str}/unassign",
    action="workspace-member:delete",
    summary="Remove members",
    description="Effective at once; keys that they made stay. A workspace keeps at least one owner.",
    status_code=200,
    responses={
        200: Answer(list[wire_access.MemberBody], description="The members, as they are now"),
        404: Answer(ErrorBody, description="That user is no member"),
        409: Answer(ErrorBody, description="No owner would be left"),
    },
)
async def unassign(
    context: Given,
    visitor: Visiting,
    workspace_id: WorkspaceId,
    data: Annotated[wire_access.Unassignment, Body()],
) -> Response[bytes]:
    by = visitor.person("remove members")
    async with context.db.transaction() as conn:
        await workspaces.remove(conn, workspace_id=workspace_id, user_ids=data.user_ids)
    log.info("member.removed", workspace=workspace_id, users=len(data.user_ids), by=by.user_id)
    return answer(await _members(context, workspace_id))


async def _members(context: Given, workspace_id: UUID) -> list[wire_access.MemberBody]:
    async with context.db.connection() as conn:
        found = await workspaces.members(conn, workspace_id=workspace_id)
    return [wire_access.member_body(member) for member in found]


# Environments -------------------------------------------------------------------------------------


@get(
    "/environment/{workspaceId:str}",
    action="environment:list",
    summary="List environments",
    description="Those of the workspace; of a key, its own.",
    responses={200: Answer(list[wire_access.EnvironmentBody], description="Environments")},
)
async def list_environments(
    context: Given, visitor: Visiting, workspace_id: WorkspaceId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        found = await workspaces.environments(conn, workspace_id=workspace_id)
    if visitor.key is not None:
        found = [each for each in found if each.environment_id == visitor.key.environment_id]
    return answer([wire_access.environment_body(each) for each in found])


@post(
    "/environment/{workspaceId:str}",
    action="environment:create",
    summary="Create an environment",
    status_code=201,
    responses={
        201: Answer(wire_access.EnvironmentBody, description="The environment"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_environment(
    context: Given,
    visitor: Visiting,
    workspace_id: WorkspaceId,
    data: Annotated[wire_access.EnvironmentCreate, Body()],
) -> Response[bytes]:
    by = visitor.person("create environments")
    async with context.db.transaction() as conn:
        await workspaces.lock(conn, workspace_id=workspace_id)
        with unique("environments_name_unique", data.name, _NAME_TAKEN, place="workspace"):
            environment_id = await tenants.create_environment(
                conn, workspace_id=workspace_id, name=data.name, description=data.description
            )
    log.info(
        "environment.created", workspace=workspace_id, environment=environment_id, by=by.user_id
    )
    return created(await _environment_body(context, workspace_id, environment_id))


@get(
    "/environment/{workspaceId:str}/{environmentId:str}",
    action="environment:get",
    summary="Read an environment",
    responses={200: Answer(wire_access.EnvironmentBody, description="The environment")},
)
async def read_environment(
    context: Given, workspace_id: WorkspaceId, environment_id: EnvironmentId
) -> Response[bytes]:
    return answer(await _environment_body(context, workspace_id, environment_id))


@route(
    "/environment/{workspaceId:str}/{environmentId:str}",
    http_method=CHANGING,
    action="environment:update",
    summary="Change an environment",
    description=_CHANGED,
    status_code=200,
    responses={
        200: Answer(wire_access.EnvironmentBody, description="The environment, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def change_environment(
    request: AnyRequest,
    context: Given,
    visitor: Visiting,
    workspace_id: WorkspaceId,
    environment_id: EnvironmentId,
) -> Response[bytes]:
    visitor.person("change environments")
    wanted = wire.changes(wire_access.NamedPatch, wire.object_of(await request.body()))
    async with context.db.transaction() as conn:
        await workspaces.lock(conn, workspace_id=workspace_id)
        held = await workspaces.environment(
            conn, workspace_id=workspace_id, environment_id=environment_id
        )
        if held is None:
            raise workspaces.no_environment(environment_id)
        name, description = wanted.applied({"name": held.name, "description": held.description})
        with unique("environments_name_unique", name, _NAME_TAKEN, place="workspace"):
            await workspaces.change_environment(
                conn,
                workspace_id=workspace_id,
                environment_id=environment_id,
                name=name,
                description=description,
            )
    return answer(await _environment_body(context, workspace_id, environment_id))


@delete(
    "/environment/{workspaceId:str}/{environmentId:str}",
    action="environment:delete",
    summary="Delete an environment",
    description="Nobody enters it any more, keys included; its history stays. Not while batches are"
    " unfinished.",
    status_code=204,
    responses={409: Answer(ErrorBody, description="Batches of it are not finished")},
)
async def delete_environment(
    context: Given, visitor: Visiting, workspace_id: WorkspaceId, environment_id: EnvironmentId
) -> None:
    by = visitor.person("delete environments")
    async with context.db.transaction() as conn:
        await workspaces.delete_environment(
            conn, workspace_id=workspace_id, environment_id=environment_id
        )
    log.info(
        "environment.deleted", workspace=workspace_id, environment=environment_id, by=by.user_id
    )


async def _environment_body(
    context: Given, workspace_id: UUID, environment_id: UUID
) -> wire_access.EnvironmentBody:
    async with context.db.connection() as conn:
        found: Environment | None = await workspaces.environment(
            conn, workspace_id=workspace_id, environment_id=environment_id
        )
    if found is None:
        raise workspaces.no_environment(environment_id)
    return wire_access.environment_body(found)


# Users and roles ----------------------------------------------------------------------------------


@get(
    "/user/me",
    action="user:get",
    summary="Read one's own account",
    responses={200: Answer(wire_access.UserBody, description="The user whose token it is")},
)
async def read_me(visitor: Visiting) -> Response[bytes]:
    return answer(wire_access.user_body(visitor.person("have an account")))


@get(
    "/user",
    action="user:list",
    summary="List users",
    description="Oneself and those with whom one shares a workspace; at most the first thousand.",
    responses={200: Answer(list[wire_access.UserBody], description="Users")},
)
async def list_users(
    context: Given,
    visitor: Visiting,
    workspace: Annotated[
        str | None,
        QueryParameter(name="workspaceId", description="only members of this workspace of theirs"),
    ] = None,
) -> Response[bytes]:
    user = visitor.person("list users")
    try:
        workspace_id = None if workspace is None else UUID(workspace)
    except ValueError:
        raise ValidationError([Problem(path="workspaceId", message="must be a UUID")]) from None
    async with context.db.connection() as conn:
        found = await workspaces.users_near(
            conn, user_id=user.user_id, workspace_id=workspace_id, most=_MOST_USERS
        )
    return answer([wire_access.user_body(each) for each in found])


@get(
    "/role",
    action="role:list",
    summary="List roles",
    description="They are built in.",
    responses={200: Answer(list[wire_access.RoleBody], description="Roles")},
    sync_to_thread=False,
)
def list_roles() -> Response[bytes]:
    return answer(wire_access.roles())


@get(
    "/role/permissions",
    action="role:list",
    summary="List actions",
    description="What roles allow, and what a key's permissions may name, also by patterns: *:get.",
    responses={200: Answer(list[wire_access.PermissionBody], description="Actions")},
    sync_to_thread=False,
)
def list_permissions() -> Response[bytes]:
    return answer(wire_access.permissions())


router = Router(
    "/v1",
    route_handlers=[
        list_workspaces,
        create_workspace,
        read_workspace,
        change_workspace,
        delete_workspace,
        list_members,
        change_role,
        assign,
        unassign,
        list_environments,
        create_environment,
        read_environment,
        change_environment,
        delete_environment,
        read_me,
        list_users,
        list_roles,
        list_permissions,
    ],
    guards=[authenticate],
    dependencies={"visitor": Provide(visitor)},
    request_max_body_size=MOST_BODY,
    tags=["Workspaces"],
)
