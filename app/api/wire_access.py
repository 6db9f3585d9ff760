"""Users, workspaces, environments, roles and API keys on the wire."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, cast
from uuid import UUID

from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BeforeValidator, Field

from app import access
from app.access import Principal, Role
from app.api.wire import (
    Answer,
    Flag,
    Json,
    Moment,
    Name,
    Sent,
    Text,
    Whole,
    instant,
    instant_or_none,
)
from app.api.wire_capacity import Capacity, capacity_entries
from app.api_keys import ApiKey
from app.workspaces import Environment, Member, User, Workspace

_PERMISSION = re.compile(r"[a-z*-]{1,50}(:[a-z*-]{1,50})?")
_MOST_OVERLAP_S = 30 * 24 * 3600

# Answers ------------------------------------------------------------------------------------------


class ApiKeyBody(Answer, kw_only=True, frozen=True):
    """An api key; ``apiKeyValue`` is shown once, by its creation and by each rotation."""

    api_key_id: UUID
    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    enabled: bool
    resources: list[str]
    permissions: list[str]
    labels: list[str]
    enforce_capacity: bool
    capacity: list[Json]
    masked_key: str
    expires_at: str | None
    last_used_at: str | None
    previous_value_until: str | None
    rotated_at: str | None
    created_at: str
    updated_at: str
    created_by: UUID | None
    updated_by: UUID | None
    api_key_value: str | UnsetType = UNSET


class UserBody(Answer, kw_only=True, frozen=True):
    """A user, as the issuer of their tokens describes them."""

    id: UUID
    name: str | None
    first_name: str | None
    last_name: str | None
    username: str | None
    email: str | None
    email_verified: bool
    picture_url: str | None
    state: str
    provider_type: str
    provider_id: str
    provider_metadata: Json | None
    created_at: str
    updated_at: str


class WhoAmI(Answer, kw_only=True, frozen=True):
    """Who is calling: a key with what it opens, or a user."""

    workspace_id: UUID | None
    environment_id: UUID | None
    api_key_id: UUID | None
    user_id: UUID | None
    name: str | None
    masked_key: str | None
    resources: list[str]
    permissions: list[str]


class WorkspaceBody(Answer, kw_only=True, frozen=True):
    """A workspace; ``role``: the caller's, null for a key."""

    workspace_id: UUID
    name: str
    description: str | None
    role: str | None
    created_at: str
    updated_at: str


class MemberBody(Answer, kw_only=True, frozen=True):
    """A user in a workspace."""

    workspace_id: UUID
    user_id: UUID
    role: str
    name: str | None
    email: str | None
    added_at: str
    added_by: UUID | None


class EnvironmentBody(Answer, kw_only=True, frozen=True):
    """An environment of a workspace."""

    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    created_at: str
    updated_at: str


class StatementBody(Answer, kw_only=True, frozen=True):
    """Actions that a role allows or denies; what is denied stays so."""

    effect: str
    actions: list[str]
    resources: list[str]


class RoleBody(Answer, kw_only=True, frozen=True):
    """A role, with its policy in the reference's form."""

    role_id: str
    name: str
    description: str
    policy: dict[str, list[StatementBody]]


class PermissionBody(Answer, kw_only=True, frozen=True):
    """An action, and the roles that may perform it."""

    action: str
    description: str
    roles: list[str]


def api_key_body(key: ApiKey, *, value: str | None = None) -> ApiKeyBody:
    """An api key on the wire; ``value`` only for whoever made or rotated it, once."""
    return ApiKeyBody(
        api_key_id=key.api_key_id,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        name=key.name,
        description=key.description,
        enabled=key.enabled,
        resources=key.resources,
        permissions=key.permissions,
        labels=key.labels,
        enforce_capacity=key.enforce_capacity,
        capacity=cast("list[Json]", key.capacity),
        masked_key=key.masked_key,
        expires_at=instant_or_none(key.expires_at),
        last_used_at=instant_or_none(key.last_used_at),
        previous_value_until=instant_or_none(key.previous_until),
        rotated_at=instant_or_none(key.rotated_at),
        created_at=instant(key.created_at),
        updated_at=instant(key.updated_at),
        created_by=key.created_by,
        updated_by=key.updated_by,
        api_key_value=UNSET if value is None else value,
    )


def user_body(user: User) -> UserBody:
    """A user on the wire."""
    return UserBody(
        id=user.user_id,
        name=user.name,
        first_name=user.first_name,
        last_name=user.last_name,
        username=user.username,
        email=user.email,
        email_verified=user.email_verified,
        picture_url=user.picture_url,
        state="ACTIVE",
        provider_type="oidc",
        provider_id=user.issuer,
        provider_metadata=None,
        created_at=instant(user.created_at),
        updated_at=instant(user.updated_at),
    )


def key_who_am_i(key: Principal) -> WhoAmI:
    """A key on the wire."""
    return WhoAmI(
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        api_key_id=key.api_key_id,
        user_id=None,
        name=key.name,
        masked_key=key.masked_key,
        resources=list(key.resources),
        permissions=list(key.permissions),
    )


def user_who_am_i(user: User) -> WhoAmI:
    """A user on the wire; what they may do depends on the workspace."""
    return WhoAmI(
        workspace_id=None,
        environment_id=None,
        api_key_id=None,
        user_id=user.user_id,
        name=user.name,
        masked_key=None,
        resources=["*"],
        permissions=[],
    )


def workspace_body(workspace: Workspace, *, role: Role | None = None) -> WorkspaceBody:
    """A workspace on the wire."""
    own = role or workspace.role
    return WorkspaceBody(
        workspace_id=workspace.workspace_id,
        name=workspace.name,
        description=workspace.description,
        role=None if own is None else _shown(own),
        created_at=instant(workspace.created_at),
        updated_at=instant(workspace.updated_at),
    )


def member_body(member: Member) -> MemberBody:
    """A member on the wire."""
    return MemberBody(
        workspace_id=member.workspace_id,
        user_id=member.user_id,
        role=_shown(member.role),
        name=member.name,
        email=member.email,
        added_at=instant(member.added_at),
        added_by=member.added_by,
    )


def environment_body(environment: Environment) -> EnvironmentBody:
    """An environment on the wire."""
    return EnvironmentBody(
        workspace_id=environment.workspace_id,
        environment_id=environment.environment_id,
        name=environment.name,
        description=environment.description,
        created_at=instant(environment.created_at),
        updated_at=instant(environment.updated_at),
    )


def roles() -> list[RoleBody]:
    """The roles there are."""
    return [
        RoleBody(
            role_id=role,
            name=role,
            description=description,
            policy={"statements": _statements(role)},
        )
        for role, description in access.ROLES.items()
    ]


def permissions() -> list[PermissionBody]:
    """The actions there are."""
    return [
        PermissionBody(
            action=action,
            description=description,
            roles=[role for role in access.ROLES if access.role_allows(role, action)],
        )
        for action, description in access.ACTIONS.items()
    ]


def _statements(role: Role) -> list[StatementBody]:
    anywhere = ["*"]
    if role == "read-only":
        return [StatementBody(effect="allow", actions=["*:get", "*:list"], resources=anywhere)]
    everything = StatementBody(effect="allow", actions=["*"], resources=anywhere)
    if role == "owner":
        return [everything]
    kept = sorted(access.OWNERS_ONLY)
    return [StatementBody(effect="deny", actions=kept, resources=anywhere), everything]


def _shown(role: Role) -> str:
    return role.upper().replace("-", "_")


# Requests -----------------------------------------------------------------------------------------


def _ids(value: list[str]) -> list[str]:
    try:
        return [each if each == "*" else str(UUID(each)) for each in value]
    except ValueError:
        raise ValueError("must be ids of resources, or *") from None


def _permissions(value: list[str]) -> list[str]:
    for each in value:
        if not _PERMISSION.fullmatch(each) or not access.is_pattern(each):
            raise ValueError(
                f"'{each[:60]}' is no action and fits none; GET /v1/role/permissions lists them"
            )
    return value


def _role(value: object) -> object:
    given = value.lower().replace("_", "-") if isinstance(value, str) else value
    if given not in access.ROLES:
        raise ValueError("must be OWNER, MEMBER or READ_ONLY")
    return given


ResourceIds = Annotated[list[Text], Field(max_length=1000), AfterValidator(_ids)]
Permissions = Annotated[list[Text], Field(max_length=100), AfterValidator(_permissions)]
GivenRole = Annotated[Role, BeforeValidator(_role)]


class _KeySettings(Sent):
    description: Text | None = None
    enabled: Flag = True
    labels: Annotated[list[Text], Field(max_length=100)] | None = None
    enforce_capacity: Flag = True
    capacity: Capacity | None = None
    expires_at: Moment = None


class ApiKeyPatch(_KeySettings):
    """Changes of an api key. Null is as if it was never said."""

    name: Name = ""
    resources: ResourceIds = Field(default_factory=list)
    permissions: Permissions = Field(default_factory=list)

    def applied(self, held: ApiKey) -> ApiKey:
        """The key as it is from now on."""
        said: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set}
        if "capacity" in said:
            said["capacity"] = capacity_entries(self.capacity)
        if "labels" in said:
            said["labels"] = self.labels or []
        return replace(held, **said)


class ApiKeyCreate(_KeySettings):
    """A new api key. ``resources``: ids of resources, or ``["*"]``. ``permissions``: patterns of actions."""

    name: Name
    resources: ResourceIds
    permissions: Permissions | None = None


class Rotation(Sent):
    """How to rotate: for how long the value of before still opens."""

    overlap_seconds: Annotated[Whole, Field(ge=0, le=_MOST_OVERLAP_S)] = 0


class WorkspaceCreate(Sent):
    """A new workspace, with its first environment."""

    name: Name
    description: Text | None = None
    environment: Name = "default"


class NamedPatch(Sent):
    """Changes of a workspace or an environment."""

    name: Name = ""
    description: Text | None = None

    def applied(self, held: Mapping[str, str | None]) -> tuple[str, str | None]:
        """Name and description from now on."""
        given = self.model_fields_set
        name = self.name if "name" in given else cast("str", held["name"])
        return name, self.description if "description" in given else held["description"]


class EnvironmentCreate(Sent):
    """A new environment."""

    name: Name
    description: Text | None = None


class Assignment(Sent):
    """Users to admit, with the role they get."""

    user_ids: Annotated[Sequence[UUID], Field(min_length=1, max_length=100)]
    role: GivenRole = "member"


class Unassignment(Sent):
    """Users to remove."""

    user_ids: Annotated[Sequence[UUID], Field(min_length=1, max_length=100)]


class RoleChange(Sent):
    """A member's new role."""

    role: GivenRole
