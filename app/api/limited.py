"""What the handlers of connections, resources and API keys share: names, changes, limits."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final
from uuid import UUID

import psycopg
from litestar import HttpMethod, Response
from litestar.openapi.datastructures import ResponseSpec

from app import capacity
from app.access import Principal
from app.api import wire, wire_capacity
from app.api.context import Context
from app.capacity import Amount, NamedScope
from app.db import Connection
from app.doorbell import WORK
from app.errors import RequestError
from app.log import Log

log = Log("api")

#: Documentation of an answer; made-up examples would be noise.
Answer = partial(ResponseSpec, generate_examples=False)

MOST_BODY: Final = 1024 * 1024

# The reference changes by PUT, with bodies as partial as those of PATCH.
CHANGING: Final = [HttpMethod.PATCH, HttpMethod.PUT]
CHANGED: Final = (
    "What is absent stays as it is; null is as if it had never been said. Effective at the next "
    "claim; calls in flight are let finish. PUT is the same."
)


@contextmanager
def unique(constraint: str, name: str, code: str, *, place: str = "environment") -> Generator[None]:
    """Translate the refusal of a name that is taken."""
    try:
        yield
    except psycopg.errors.UniqueViolation as error:
        if error.diag.constraint_name != constraint:
            raise
        raise RequestError(
            f"The name '{name}' is already taken in this {place}.", code=code
        ) from None


def amounts_of(changed: set[str], entries: Sequence[Mapping[str, object]]) -> list[Amount] | None:
    """The limits from now on, if a change says anything of them."""
    if changed.isdisjoint({"capacity", "enforce_capacity"}):
        return None
    return wire_capacity.stored_amounts(entries)


def ring(context: Context, resources: Sequence[UUID], **changed: UUID) -> None:
    """Tell of a committed change, and ring for what it gives workers to do."""
    log.info("settings.changed", **changed)
    context.ringer.ring(WORK, resources)


def shows(key: Principal, scope: NamedScope) -> bool:
    """Whether a caller may know of it: a confined key not of others' batches, keys and addresses."""
    if "*" in key.resources or scope.scope_id == key.api_key_id:
        return True
    return scope.kind in ("connection", "model", "resource")


async def usage(
    context: Context, conn: Connection, key: Principal, scope_ids: Sequence[UUID]
) -> wire_capacity.CapacityUsage:
    """Where the limits of these scopes stand, of those that the caller may know."""
    named = await capacity.named(conn, workspace_id=key.workspace_id, scope_ids=scope_ids)
    scopes = {scope_id: scope for scope_id, scope in named.items() if shows(key, scope)}
    used = await capacity.usage(
        conn,
        workspace_id=key.workspace_id,
        scope_ids=scope_ids,
        guard_s=context.settings.guard_s,
        with_reserved=True,
    )
    return wire_capacity.capacity_usage(scopes, used)


def answer(body: object, status: int = 200) -> Response[bytes]:
    """A body as JSON."""
    return Response(wire.encode(body), media_type="application/json", status_code=status)


def created(body: object) -> Response[bytes]:
    """The same for something new."""
    return answer(body, 201)
