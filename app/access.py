"""What callers may do: actions, the roles of users, the permissions of keys. Decided here only.

Every route names one action, ``noun:verb``, out of ``ACTIONS``. A user's role in the workspace allows
it or not; an api key's permissions are patterns of actions in which ``*`` stands for any text. A key
never leaves its environment: what concerns the workspace as a whole is for users, whatever a
key's permissions say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal
from uuid import UUID

Role = Literal["owner", "member", "read-only"]

ROLES: Final[Mapping[Role, str]] = MappingProxyType(
    {
        "owner": "Everything.",
        "member": "Everything but members, permissions of keys, and deleting the workspace.",
        "read-only": "Look at everything, change nothing.",
    }
)

#: Every action there is, and what it allows. A new route declares one of these, or adds its own.
ACTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "completion-batch:create": "create batches, and estimate them",
        "completion-batch:get": "read batches, their items, events, deliveries and use of limits",
        "completion-batch:list": "list batches",
        "completion-batch:update": "steer, pause and resume batches, and tell of them again",
        "completion-batch:cancel": "cancel batches",
        "completion-batch:retry": "try items of batches again",
        "completion-batch:erase": "erase prompts and answers",
        "file:create": "upload files",
        "file:get": "read files",
        "file:list": "list files",
        "file:delete": "delete files",
        "request-usage:get": "read use and error rates",
        "request-audit:list": "list calls, with what was asked and answered",
        "ai-connection:create": "create connections",
        "ai-connection:get": "read connections and their use of limits",
        "ai-connection:list": "list connections",
        "ai-connection:update": "change connections",
        "ai-connection:delete": "delete connections",
        "ai-connection:test": "make a call to see whether a connection works",
        "ai-provider:list": "list the providers known by name",
        "ai-resource:create": "create resources",
        "ai-resource:get": "read resources and their use of limits",
        "ai-resource:list": "list resources",
        "ai-resource:update": "change resources",
        "ai-resource:delete": "delete resources",
        "ai-resource:test": "make a call to see whether a resource works",
        "api-key:create": "create API keys",
        "api-key:get": "read API keys and their use of limits",
        "api-key:list": "list API keys",
        "api-key:update": "change API keys",
        "api-key:rotate": "give API keys a new value",
        "api-key:delete": "delete API keys",
        "api-key:permit": "say what an API key may do",
        "webhook-endpoint:create": "create webhook endpoints",
        "webhook-endpoint:get": "read webhook endpoints",
        "webhook-endpoint:list": "list webhook endpoints and types of events",
        "webhook-endpoint:update": "change webhook endpoints",
        "webhook-endpoint:rotate": "give webhook endpoints a new secret",
        "webhook-endpoint:test": "send sample events to webhook endpoints",
        "webhook-endpoint:delete": "delete webhook endpoints",
        "workspace:create": "create workspaces",
        "workspace:get": "read the workspace",
        "workspace:list": "list one's workspaces",
        "workspace:update": "rename the workspace",
        "workspace:delete": "delete the workspace",
        "workspace-member:list": "list the members",
        "workspace-member:create": "admit members",
        "workspace-member:update": "change members' roles",
        "workspace-member:delete": "remove members",
        "environment:create": "create environments",
        "environment:get": "read environments",
        "environment:list": "list environments",
        "environment:update": "rename environments",
        "environment:delete": "delete environments",
        "user:get": "read one's own account",
        "user:list": "list those one shares a workspace with",
        "role:list": "list roles and actions",
    }
)

#: Looking at one's own place is no danger; the rest of these nouns reaches beyond an environment.
_ABOVE: Final = ("workspace", "workspace-member", "environment", "user")
_LOOKING: Final = ("get", "list")

#: What only owners do.
OWNERS_ONLY: Final = frozenset(
    {
        "workspace:delete",
        "workspace-member:create",
        "workspace-member:update",
        "workspace-member:delete",
        "api-key:permit",
    }
)

#: What a user does on their own account, in no workspace.
ALONE: Final = frozenset(
    {
        "ai-provider:list",
        "workspace:create",
        "workspace:list",
        "user:get",
        "user:list",
        "role:list",
    }
)

#: What a new key may do when its maker is a member: the work of an environment, not its keys.
MEMBERS_KEY: Final = (
    "completion-batch:*",
    "file:*",
    "ai-connection:*",
    "ai-resource:*",
    "ai-provider:list",
    "request-usage:*",
    "request-audit:*",
    "webhook-endpoint:*",
)

#: Every action of an environment: what keys may do where nothing else is said.
EVERYTHING: Final = ("*",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is calling, and the one environment in which they do it.

    Either a key or a user, so one of ``api_key_id`` and ``user_id`` is None. ``resources``: ids that
    may be used, or ``*``.
    """

    workspace_id: UUID
    environment_id: UUID
    name: str
    resources: Sequence[str]
    permissions: Sequence[str] = ()
    api_key_id: UUID | None = None
    masked_key: str | None = None
    user_id: UUID | None = None
    role: Role | None = None

    @property
    def actor_id(self) -> UUID | None:
        """The id under which what they change is noted."""
        return self.user_id or self.api_key_id

    def may_use(self, resource_id: UUID) -> bool:
        """Whether their allowlist has the resource."""
        return "*" in self.resources or str(resource_id) in self.resources

    def may(self, action: str) -> bool:
        """Whether they may perform an action."""
        if self.role is not None:
            return role_allows(self.role, action)
        return key_allows(self.permissions, action)

    def may_give(self, permissions: Sequence[str]) -> bool:
        """Whether a key with these permissions would do nothing that they may not do themselves."""
        if self.role is not None:
            return all(role_allows(self.role, a) for a in ACTIONS if key_allows(permissions, a))
        # A pattern fits another when it fits it as plain text: the other's * then lies within its own.
        return all(any(_fits(own, given) for own in self.permissions) for given in permissions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What an issuer says of a user; None: it says nothing of that."""

    issuer: str
    subject: str
    name: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    username: str | None = None
    email: str | None = None
    email_verified: bool | None = None
    picture_url: str | None = None


def role_allows(role: Role, action: str) -> bool:
    """Whether a user with this role may perform an action."""
    match role:
        case "owner":
            return True
        case "member":
            return action not in OWNERS_ONLY
        case "read-only":
            return action.rpartition(":")[2] in _LOOKING


def key_allows(permissions: Sequence[str], action: str) -> bool:
    """Whether a key with these permissions may perform an action."""
    noun, _, verb = action.partition(":")
    if noun in _ABOVE and verb not in _LOOKING:
        return False
    return any(_fits(pattern, action) for pattern in permissions)


def is_pattern(text: str) -> bool:
    """Whether a permission can be meant: it fits some action that exists."""
    return any(_fits(text, action) for action in ACTIONS)


def _fits(pattern: str, text: str) -> bool:
    """Whether a text is the pattern, in which * stands for any text. Linear, whatever the pattern."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    last = rest.pop()
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for part in rest:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
