"""Endpoints, and the deliveries to them: the outbox of what other programs are told.

Deliveries are written by the queue's functions, in the transaction of the event that they tell of (see
sql/functions/deliveries.sql). Here they are claimed, recorded, shown and asked for again; app/sender.py
sends them. Whoever changes deliveries holds their endpoint's row: ``hold`` or ``take`` first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Final, Literal, TypedDict
from uuid import UUID

from app import signatures
from app.db import Connection, NoRow, Query
from app.errors import SecretError
from app.events import Kind
from app.ids import uuid7
from app.secrets import Keyring, Sealed

Status = Literal["pending", "delivered", "dead"]

#: What a callback may subscribe to; ``all`` is the first two.
TOPICS: Final = ("item_update", "batch_update", "item_running")
ALL: Final = ("item_update", "batch_update")

#: What a standing endpoint may subscribe to.
EVENT_TYPES: Final = ("batch.completed", "batch.failed", "batch.expired", "batch.cancelled")

OVERLAP_S: Final = 86_400.0
"""How long a rotated secret goes on signing, where that is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where deliveries go; its secrets are sealed. Of a batch's callback the ids are equal."""

    workspace_id: UUID
    endpoint_id: UUID
    environment_id: UUID
    batch_id: UUID | None
    batch_day: date | None
    name: str | None
    url: str
    event_types: list[str]
    secret_key_id: str
    secret: bytes = field(repr=False)
    secret_hint: str
    old_secret_until: datetime | None
    disabled_at: datetime | None
    disabled_reason: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEndpoint:
    """An endpoint to store."""

    workspace_id: UUID
    endpoint_id: UUID
    environment_id: UUID
    batch_id: UUID | None = None
    batch_day: date | None = None
    name: str | None = None
    url: str
    event_types: Sequence[str]
    sealed: Sealed
    secret_hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """What of an endpoint is sealed: its secrets, and the values of its headers."""

    secret: str = field(repr=False)
    old_secret: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    is_minted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """An endpoint that has something to send, now or after ``wait_s``."""

    workspace_id: UUID
    endpoint_id: UUID
    url: str
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A delivery to try now. ``attempt`` is its fencing number."""

    batch_day: date
    batch_id: UUID
    event_no: int
    seq: int | None
    kind: Kind
    topic: str
    attempt: int
    failures: int
    created_at: datetime

    @property
    def message_id(self) -> str:
        """The receiver's idempotency key: the same at every try, and for every endpoint."""
        return message_id(self.batch_id, self.event_no)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What came of a try. ``wait_s``: until the next one, of a delivery that stays pending."""

    delivery: Claimed
    status: Status
    reason: str | None = None
    wait_s: float = 0.0
    started_at: datetime
    latency_ms: int
    status_code: int | None = None
    error_code: str | None = None
    error_message: str | None = None


class Try(TypedDict):
    """One try of a delivery, as it is on record."""

    attempt: int
    started_at: str
    latency_ms: int
    status_code: int | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A delivery and its tries. ``url`` is None when its endpoint was deleted."""

    batch_id: UUID
    event_no: int
    endpoint_id: UUID
    seq: int | None
    kind: Kind
    status: Status
    reason: str | None
    attempt: int
    visible_at: datetime
    created_at: datetime
    ended_at: datetime | None
    url: str | None
    tries: list[Try]


@dataclass(frozen=True, slots=True, kw_only=True)
class _EndpointId:
    endpoint_id: UUID


_endpoint_insert = Query("webhooks", "endpoint_insert", NoRow)
_endpoint_get = Query("webhooks", "endpoint_get", Endpoint)
_endpoints_page = Query("webhooks", "endpoints_page", Endpoint)
_endpoint_hold = Query("webhooks", "endpoint_hold", Endpoint)
_endpoint_take = Query("webhooks", "endpoint_take", Endpoint)
_endpoint_change = Query("webhooks", "endpoint_change", NoRow)
_endpoint_reseal = Query("webhooks", "endpoint_reseal", NoRow)
_endpoint_disable = Query("webhooks", "endpoint_disable", NoRow)
_endpoint_enable = Query("webhooks", "endpoint_enable", NoRow)
_endpoint_delete = Query("webhooks", "endpoint_delete", NoRow)
_endpoint_rest = Query("webhooks", "endpoint_rest", NoRow)
_endpoints_due = Query("webhooks", "endpoints_due", Due)
_endpoints_postpone = Query("webhooks", "endpoints_postpone", NoRow)
_endpoints_sweep = Query("webhooks", "endpoints_sweep", NoRow)
_deliveries_claim = Query("webhooks", "deliveries_claim", Claimed)
_deliveries_settle = Query("webhooks", "deliveries_settle", NoRow)
_deliveries_bury = Query("webhooks", "deliveries_bury", NoRow)
_deliveries_page = Query("webhooks", "deliveries_page", Delivery)
_deliveries_redeliver = Query("webhooks", "deliveries_redeliver", NoRow)
_endpoints_of_dead = Query("webhooks", "endpoints_of_dead", _EndpointId)


def message_id(batch_id: UUID, event_no: int) -> str:
    """The id of the message that tells of an event."""
    return f"evt_{batch_id.hex}_{event_no}"


# Endpoints ----------------------------------------------------------------------------------------


def callback(
    keyring: Keyring,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    batch_id: UUID,
    batch_day: date,
    url: str,
    topics: Sequence[str],
    headers: Mapping[str, str],
    secret: str | None,
) -> NewEndpoint:
    """The endpoint of a CALLBACK batch. Without a ``secret`` one is made; ``open_`` tells it."""
    confidence = Confidence(
        secret=secret or signatures.mint_secret(), headers=headers, is_minted=secret is None
    )
    return NewEndpoint(
        workspace_id=workspace_id,
        endpoint_id=batch_id,
        environment_id=environment_id,
        batch_id=batch_id,
        batch_day=batch_day,
        url=url,
        event_types=topics,
        sealed=_sealed(keyring, batch_id, confidence),
        secret_hint=signatures.hint(confidence.secret),
    )


def standing(
    keyring: Keyring,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    name: str,
    url: str,
    event_types: Sequence[str],
) -> tuple[NewEndpoint, str]:
    """A webhook of an environment, and its secret, which is shown once."""
    endpoint_id = uuid7()
    secret = signatures.mint_secret()
    made = NewEndpoint(
        workspace_id=workspace_id,
        endpoint_id=endpoint_id,
        environment_id=environment_id,
        name=name,
        url=url,
        event_types=event_types,
        sealed=_sealed(keyring, endpoint_id, Confidence(secret=secret)),
        secret_hint=signatures.hint(secret),
    )
    return made, secret


async def add(conn: Connection, new: NewEndpoint) -> None:
    """Store an endpoint; of a callback after its batch."""
    await _endpoint_insert.run(
        conn,
        workspace_id=new.workspace_id,
        endpoint_id=new.endpoint_id,
        environment_id=new.environment_id,
        batch_id=new.batch_id,
        batch_day=new.batch_day,
        name=new.name,
        url=new.url,
        event_types=list(new.event_types),
        secret_key_id=new.sealed.key_id,
        secret=new.sealed.ciphertext,
        secret_hint=new.secret_hint,
    )


def open_(keyring: Keyring, endpoint: Endpoint) -> Confidence:
    """What of an endpoint is sealed. Raises SecretError."""
    sealed = Sealed(key_id=endpoint.secret_key_id, ciphertext=endpoint.secret)
    told = json.loads(keyring.open(sealed, context=_context(endpoint.endpoint_id)))
    return Confidence(**told)


def _sealed(keyring: Keyring, endpoint_id: UUID, confidence: Confidence) -> Sealed:
    told = json.dumps(
        {
            "secret": confidence.secret,
            "old_secret": confidence.old_secret,
            "headers": dict(confidence.headers),
            "is_minted": confidence.is_minted,
        }
    )
    return keyring.seal(told, context=_context(endpoint_id))


def _context(endpoint_id: UUID) -> str:
    return f"endpoint:{endpoint_id}"


async def endpoint(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, endpoint_id: UUID
) -> Endpoint | None:
    """An endpoint of either kind, or None."""
    return await _endpoint_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, endpoint_id=endpoint_id
    )


async def page(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, before: UUID | None, most: int
) -> list[Endpoint]:
    """Standing endpoints of an environment, newest first, those below ``before``."""
    return await _endpoints_page.all(
        conn, workspace_id=workspace_id, environment_id=environment_id, before=before, most=most
    )


async def hold(conn: Connection, *, workspace_id: UUID, endpoint_id: UUID) -> Endpoint | None:
    """Wait for an endpoint and keep it until the commit; None when there is none any more."""
    return await _endpoint_hold.one_or_none(
        conn, workspace_id=workspace_id, endpoint_id=endpoint_id
    )


async def take(conn: Connection, *, workspace_id: UUID, endpoint_id: UUID) -> Endpoint | None:
    """The same without waiting; None also when another has it."""
    return await _endpoint_take.one_or_none(
        conn, workspace_id=workspace_id, endpoint_id=endpoint_id
    )


async def change(
    conn: Connection, *, held: Endpoint, name: str | None, url: str, event_types: Sequence[str]
) -> None:
    """Change an endpoint that is held. One that was disabled is told of what happens from now on."""
    await _endpoint_change.run(
        conn,
        workspace_id=held.workspace_id,
        endpoint_id=held.endpoint_id,
        name=name,
        url=url,
        event_types=list(event_types),
    )


async def rotate(conn: Connection, keyring: Keyring, *, held: Endpoint, overlap_s: float) -> str:
    """A new secret for an endpoint that is held; the old one signs too for ``overlap_s``.

    An old one that cannot be opened is no obstacle: this is how to get rid of it.
    """
    secret = signatures.mint_secret()
    try:
        known = open_(keyring, held)
    except SecretError:
        confidence = Confidence(secret=secret)
    else:
        confidence = Confidence(secret=secret, old_secret=known.secret, headers=known.headers)
    sealed = _sealed(keyring, held.endpoint_id, confidence)
    await _endpoint_reseal.run(
        conn,
        workspace_id=held.workspace_id,
        endpoint_id=held.endpoint_id,
        secret_key_id=sealed.key_id,
        secret=sealed.ciphertext,
        secret_hint=signatures.hint(secret),
        overlap_s=overlap_s,
    )
    return secret


async def delete(conn: Connection, *, held: Endpoint) -> None:
    """Forget an endpoint that is held, and give up what was pending for it."""
    await _bury(conn, held, "its endpoint was deleted")
    await _endpoint_delete.run(conn, workspace_id=held.workspace_id, endpoint_id=held.endpoint_id)


async def disable(conn: Connection, *, held: Endpoint, reason: str) -> None:
    """Send nothing more to an endpoint that is held, and give up what was pending for it."""
    await _endpoint_disable.run(
        conn, workspace_id=held.workspace_id, endpoint_id=held.endpoint_id, reason=reason
    )
    await _bury(conn, held, reason)


async def _bury(conn: Connection, held: Endpoint, reason: str) -> None:
    await _deliveries_bury.run(
        conn, workspace_id=held.workspace_id, endpoint_id=held.endpoint_id, reason=reason
    )


# Deliveries ---------------------------------------------------------------------------------------


async def due(conn: Connection, *, within_s: float, most: int = 1000) -> list[Due]:
    """Endpoints of any tenant that have something to send, or will within so many seconds."""
    return await _endpoints_due.all(conn, within_s=within_s, most=most)


async def postpone(conn: Connection, waits: Sequence[tuple[Due, float]]) -> None:
    """Look at endpoints again only after so many seconds each."""
    await _endpoints_postpone.run(
        conn,
        workspace_ids=[due.workspace_id for due, _ in waits],
        endpoint_ids=[due.endpoint_id for due, _ in waits],
        waits_s=[wait_s for _, wait_s in waits],
    )


async def sweep(conn: Connection) -> int:
    """Wake standing endpoints that could not be woken in time; how many."""
    return await _endpoints_sweep.run(conn)


async def claim(conn: Connection, *, held: Endpoint, most: int, lease_s: float) -> list[Claimed]:
    """Due deliveries of an endpoint that is held, oldest first; ours for ``lease_s``."""
    claimed = await _deliveries_claim.all(
        conn,
        workspace_id=held.workspace_id,
        endpoint_id=held.endpoint_id,
        is_callback=held.batch_id is not None,
        most=most,
        lease_s=lease_s,
    )
    return sorted(claimed, key=lambda each: each.event_no)


async def settle(conn: Connection, *, held: Endpoint, tried: Sequence[Tried]) -> None:
    """Record what came of tries at an endpoint that is held."""
    await _deliveries_settle.run(
        conn,
        workspace_id=held.workspace_id,
        endpoint_id=held.endpoint_id,
        status=[each.status for each in tried],
        reason=[each.reason for each in tried],
        wait_s=[each.wait_s for each in tried],
        failed=[int(each.status != "delivered") for each in tried],
        started_at=[each.started_at for each in tried],
        latency_ms=[each.latency_ms for each in tried],
        status_code=[each.status_code for each in tried],
        error_code=[each.error_code for each in tried],
        error_message=[each.error_message for each in tried],
        **_keys([each.delivery for each in tried]),
    )


def _keys(claimed: Sequence[Claimed]) -> dict[str, list[object]]:
    return {
        "batch_day": [each.batch_day for each in claimed],
        "batch_id": [each.batch_id for each in claimed],
        "event_no": [each.event_no for each in claimed],
        "attempt": [each.attempt for each in claimed],
    }


async def rest(conn: Connection, *, held: Endpoint) -> None:
    """Note from when on an endpoint that is held has something to claim: after every change of it."""
    await _endpoint_rest.run(conn, workspace_id=held.workspace_id, endpoint_id=held.endpoint_id)


async def deliveries(
    conn: Connection,
    *,
    workspace_id: UUID,
    batch_id: UUID,
    batch_day: date,
    after: tuple[int, UUID],
    status: Status | None,
    most: int,
) -> list[Delivery]:
    """Deliveries of a batch in the order of its events, those after an event and endpoint."""
    return await _deliveries_page.all(
        conn,
        workspace_id=workspace_id,
        batch_id=batch_id,
        batch_day=batch_day,
        after_no=after[0],
        after_endpoint_id=after[1],
        status=status,
        most=most,
    )


async def redeliver(
    conn: Connection, *, held: Endpoint, batch_id: UUID, batch_day: date, event_no: int | None
) -> int:
    """Try deliveries to an endpoint that is held again now; how many.

    One, whatever became of it; or (None) all of the batch that were given up. An endpoint that was
    disabled is enabled: somebody says that it is back.
    """
    await _endpoint_enable.run(conn, workspace_id=held.workspace_id, endpoint_id=held.endpoint_id)
    again = await _deliveries_redeliver.run(
        conn,
        workspace_id=held.workspace_id,
        endpoint_id=held.endpoint_id,
        batch_id=batch_id,
        batch_day=batch_day,
        event_no=event_no,
    )
    await rest(conn, held=held)
    return again


async def endpoints_of_dead(
    conn: Connection, *, workspace_id: UUID, batch_id: UUID, batch_day: date
) -> list[UUID]:
    """The endpoints to which deliveries of a batch were given up, in the order of their locks."""
    rows = await _endpoints_of_dead.all(
        conn, workspace_id=workspace_id, batch_id=batch_id, batch_day=batch_day
    )
    return [row.endpoint_id for row in rows]
