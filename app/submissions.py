"""Batches made from files, and batches as OpenAI's routes show them.

A submission says which file is to become which batch. It is validated under a lease by any process
that serves the API (`app.validator`), and in the end accepted, failed or cancelled:

    validating ──accept──▶ accepted     the batch is there, whole, in the same transaction
        │  ├─────fail────▶ failed       what is wrong with which line; nothing of it runs
        │  └────cancel───▶ cancelled
        └── its lease passes: another process begins anew

The fencing number is the lease's id: who lost the lease decides nothing. From acceptance on the
batch is like any other; `Submitted` joins both, and also shows batches that were never a file. One that
never becomes a batch is told to the webhooks of its environment by the transaction that decides so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from app import intake, queue
from app.batch_lines import LineError
from app.batches import PauseReason
from app.db import Connection, NoRow, Query
from app.errors import ConflictError
from app.ids import created_on, uuid7

State = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSubmission:
    """A batch to make from a file. ``window``: the time it has, from now on."""

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID = field(default_factory=uuid7)
    input_file_id: UUID
    endpoint: str
    completion_window: str
    window: timedelta
    name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    priority: int = 0
    weight: float = 1
    max_tokens: int | None = None
    max_cost_nano: int | None = None
    output_expires_s: int | None = None
    source_ip: str | None = None
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    created_by_api_key_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A submission to validate. ``tries``: how often somebody began."""

    workspace_id: UUID
    batch_id: UUID
    environment_id: UUID
    input_file_id: UUID
    endpoint: str
    name: str | None
    metadata: dict[str, Any]
    priority: int
    weight: float
    max_tokens: int | None
    max_cost_nano: int | None
    source_ip: str | None
    created_by_api_key_id: UUID
    created_at: datetime
    expires_at: datetime
    tries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A batch, however it was made, and what its file is still waiting for.

    ``submission`` is ``accepted`` for batches that were never a file; those have no
    ``input_file_id``. ``status`` is None while there is no batch. ``begun_at``: when there was one.
    """

    batch_id: UUID
    submission: Literal["validating", "accepted", "failed", "cancelled"]
    status: Literal["pending", "running", "completed", "failed", "cancelled"] | None
    endpoint: str
    input_file_id: UUID | None
    completion_window: str | None
    model: str | None
    errors: list[dict[str, Any]] | None
    name: str | None
    metadata: dict[str, Any]
    priority: int
    weight: float
    created_at: datetime
    expires_at: datetime | None
    decided_at: datetime | None
    created_by_api_key_id: UUID | None
    begun_at: datetime | None
    expired_at: datetime | None
    cancelled_at: datetime | None
    completed_at: datetime | None
    redrives: int
    total_items: int
    pending: int
    running: int
    completed: int
    failed: int
    cancelled: int
    unmarked: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    is_paused: bool
    max_tokens: int | None
    max_cost_nano: int | None
    cost_nano: int
    currency: str | None
    pause_reason: PauseReason | None
    resource_ids: list[UUID]
    now: datetime

    @property
    def state(self) -> State:
        """OpenAI's state.

        Finalizing: its deadline has passed, nothing more is begun, and what is out or waiting comes
        to its end. A batch whose items all failed is completed: failed means that it never ran.
        """
        if self.status is None:
            return "validating" if self.submission == "accepted" else self.submission
        if self.status == "cancelled":
            return "cancelling" if self.completed_at is None else "cancelled"
        if self.completed_at is not None:
            return "completed" if self.expired_at is None else "expired"
        if self.expires_at is not None and self.expires_at <= self.now:
            return "finalizing"
        return "in_progress"

    @property
    def output_lines(self) -> int:
        """Lines of its output file."""
        return self.completed

    @property
    def error_lines(self) -> int:
        """Lines of its error file so far: failed, expired and cancelled items."""
        return self.failed + self.cancelled - self.unmarked


@dataclass(frozen=True, slots=True, kw_only=True)
class _ByKey:
    batch_id: UUID
    request_hash: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Id:
    batch_id: UUID


_submission_insert = Query("submissions", "submission_insert", NoRow)
_by_idempotency_key = Query("submissions", "submission_by_idempotency_key", _ByKey)
_submission_lease = Query("submissions", "submission_lease", Leased)
_submission_renew = Query("submissions", "submission_renew", NoRow)
_submission_release = Query("submissions", "submission_release", NoRow)
_submission_decide = Query("submissions", "submission_decide", NoRow)
_submission_cancel = Query("submissions", "submission_cancel", NoRow)
_submission_tell = Query("submissions", "submission_tell", NoRow)
_submitted_ids = Query("submissions", "submitted_ids", _Id)
_submitted_some = Query("submissions", "submitted_some", Submitted)


async def prepare_day(conn: Connection, new: NewSubmission) -> None:
    """Make its partitions, outside of and before any transaction that may decide on it."""
    await queue.ensure_partitions(conn, day=created_on(new.batch_id))


async def submit(conn: Connection, new: NewSubmission) -> UUID:
    """Take a batch in, to be validated; its id, or that of the one this very request made before.

    Needs a transaction, and ``prepare_day`` before it. Raises ConflictError when the idempotency key
    was used for another request.
    """
    if new.idempotency_key is not None:
        await intake.lock_idempotency(
            conn,
            workspace_id=new.workspace_id,
            environment_id=new.environment_id,
            idempotency_key=new.idempotency_key,
        )
        known = await _by_idempotency_key.one_or_none(
            conn,
            workspace_id=new.workspace_id,
            environment_id=new.environment_id,
            idempotency_key=new.idempotency_key,
        )
        if known is not None:
            if known.request_hash == new.request_hash:
                return known.batch_id
            raise ConflictError(
                "This Idempotency-Key was used for a different request; use a new key.",
                code="IDEMPOTENCY_MISMATCH",
            )
    await _submission_insert.run(
        conn,
        workspace_id=new.workspace_id,
        batch_id=new.batch_id,
        environment_id=new.environment_id,
        input_file_id=new.input_file_id,
        endpoint=new.endpoint,
        completion_window=new.completion_window,
        name=new.name,
        metadata=Jsonb(dict(new.metadata)),
        priority=new.priority,
        weight=new.weight,
        max_tokens=new.max_tokens,
        max_cost_nano=new.max_cost_nano,
        output_expires_s=new.output_expires_s,
        source_ip=new.source_ip,
        idempotency_key=new.idempotency_key,
        request_hash=new.request_hash,
        created_by_api_key_id=new.created_by_api_key_id,
        window=new.window,
    )
    return new.batch_id


async def lease(conn: Connection, *, lease_id: UUID, lease_s: float) -> Leased | None:
    """Take the oldest submission that nobody validates, of any tenant; None: there is none."""
    return await _submission_lease.one_or_none(conn, lease_id=lease_id, lease_s=lease_s)


async def renew(conn: Connection, *, held: Leased, lease_id: UUID, lease_s: float) -> bool:
    """Keep a lease; False when it was lost, or what it was for was cancelled."""
    renewed = await _submission_renew.run(
        conn,
        workspace_id=held.workspace_id,
        batch_id=held.batch_id,
        lease_id=lease_id,
        lease_s=lease_s,
    )
    return renewed > 0


async def release(conn: Connection, *, held: Leased, lease_id: UUID) -> None:
    """Give a lease back: another may begin anew at once."""
    await _submission_release.run(
        conn, workspace_id=held.workspace_id, batch_id=held.batch_id, lease_id=lease_id
    )


async def decide(
    conn: Connection,
    *,
    held: Leased,
    lease_id: UUID,
    model: str | None = None,
    errors: Sequence[LineError] = (),
) -> bool:
    """Accept it, in the transaction that makes its batch, or say what is wrong with it.

    False when the lease was lost or it was cancelled: whatever else the transaction did must not be.
    """
    decided = await _submission_decide.run(
        conn,
        workspace_id=held.workspace_id,
        batch_id=held.batch_id,
        lease_id=lease_id,
        status="failed" if errors else "accepted",
        model=model,
        errors=Jsonb(msgspec.to_builtins(list(errors))),
    )
    if decided and errors:
        await _tell(conn, workspace_id=held.workspace_id, batch_id=held.batch_id)
    return decided > 0


async def cancel(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> bool:
    """Cancel it while it is validated; False when it is not any more. Needs a transaction."""
    cancelled = await _submission_cancel.run(conn, workspace_id=workspace_id, batch_id=batch_id)
    if cancelled:
        await _tell(conn, workspace_id=workspace_id, batch_id=batch_id)
    return cancelled > 0


async def _tell(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> None:
    await _submission_tell.run(
        conn, workspace_id=workspace_id, batch_id=batch_id, batch_day=created_on(batch_id)
    )


async def page(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    api_key_id: UUID,
    allowed: Sequence[UUID] | None,
    after: UUID | None,
    most: int,
) -> list[Submitted]:
    """Batches of an environment, newest first, those below ``after``.

    ``allowed``: only those whose resources are all among these, and the caller's own submissions.
    """
    rows = await _submitted_ids.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        api_key_id=api_key_id,
        resource_ids=None if allowed is None else list(allowed),
        after=after,
        most=most,
    )
    return await _submitted_some.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        batch_ids=[row.batch_id for row in rows],
    )


async def get(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, batch_id: UUID
) -> Submitted | None:
    """One of them, or None."""
    return await _submitted_some.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, batch_ids=[batch_id]
    )
