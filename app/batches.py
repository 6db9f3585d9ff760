"""Batches: read, list, steer, pause, try again. They are made in ``app.intake``, their items read in ``app.items``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from app import capacity
from app.capacity import Amount
from app.db import Connection, NoRow, Query
from app.errors import ConflictError

BatchType = Literal["sync", "async", "callback"]
Status = Literal["pending", "running", "completed", "failed", "cancelled"]
PauseReason = Literal["max-tokens", "max-cost"]


#: States that do not change any more (but for failed items put back by ``redrive``).
TERMINAL: frozenset[str] = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch and the sums of its flows' counters."""

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    batch_day: date
    type: BatchType
    status: Status
    endpoint: str
    name: str | None
    metadata: dict[str, Any]
    capacity: list[dict[str, Any]]
    callback_options: dict[str, Any] | None
    priority: int
    weight: float
    expires_at: datetime | None
    expired_at: datetime | None
    total_items: int
    estimated_input_tokens: int
    idempotency_key: str | None
    request_hash: bytes | None
    created_by_api_key_id: UUID | None
    created_by_user_id: UUID | None
    created_at: datetime
    started_at: datetime | None
    cancelled_at: datetime | None
    completed_at: datetime | None
    timeout_ms: int | None
    max_attempts: int | None
    pending: int
    running: int
    completed: int
    failed: int
    cancelled: int
    retries: int
    input_tokens: int
    output_tokens: int
    is_paused: bool
    cost_nano: int
    currency: str | None
    max_tokens: int | None
    max_cost_nano: int | None
    pause_reason: PauseReason | None
    texts_are_erased: bool

    @property
    def ended(self) -> int:
        """Items in a terminal state."""
        return self.completed + self.failed + self.cancelled

    @property
    def is_finished(self) -> bool:
        """Whether its last event has been written: nothing of it is open any more."""
        return self.completed_at is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """Which batches a list is to have. Empty or None: any.

    ``name``: a part of it, in any letter case. ``metadata``: has these fields with these values.
    """

    statuses: Sequence[Status] = ()
    types: Sequence[BatchType] = ()
    name: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    resource_id: UUID | None = None
    api_key_id: UUID | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What steers a batch while it runs. ``capacity``: its limits as people wrote them."""

    priority: int
    weight: float
    expires_at: datetime | None
    capacity: list[dict[str, Any]]
    max_tokens: int | None
    max_cost_nano: int | None
    currency: str | None
    pause_reason: PauseReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBatch:
    """One of the batches that a run of the command line made: rows from ``first_row`` (0) on.

    A run that was begun anew has several ``generation``s; only the newest is gone on with.
    """

    batch_id: UUID
    batch_day: date
    status: Status
    total_items: int
    generation: int
    first_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResourceId:
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uses:
    batch_id: UUID
    resource_ids: list[UUID]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Redriven:
    redriven: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    status: Status
    priority: int
    weight: float
    expires_at: datetime | None
    capacity: list[dict[str, Any]]
    max_tokens: int | None
    max_cost_nano: int | None
    currency: str | None
    pause_reason: PauseReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seeded:
    seeded: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhausted:
    """A batch that may have spent what it may."""

    workspace_id: UUID
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paused:
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Now:
    now: datetime


_ready_now = Query("batches", "ready_now", NoRow)
_batch_get = Query("batches", "batch_get", Batch)
_batches_page = Query("batches", "batches_page", Batch)
_batch_resources = Query("batches", "batch_resources", _ResourceId)
_flows_pause = Query("batches", "flows_pause", NoRow)
_flows_resume = Query("batches", "flows_resume", NoRow)
_batch_unpause = Query("batches", "batch_unpause", NoRow)
_batch_budget_seed = Query("batches", "batch_budget_seed", _Seeded)
_batches_exhausted = Query("batches", "batches_exhausted", Exhausted)
_batch_pause_exhausted = Query("batches", "batch_pause_exhausted", _Paused)
_flows_lock = Query("batches", "flows_lock", _ResourceId)
_batch_lock = Query("batches", "batch_lock", _Held)
_batch_change = Query("batches", "batch_change", NoRow)
_flows_steer = Query("batches", "flows_steer", NoRow)
_now = Query("batches", "now", _Now)
_batches_resources = Query("batches", "batches_resources", _Uses)
_run_batches = Query("batches", "run_batches", RunBatch)
_redrive = Query("items", "items_redrive", _Redriven)


async def get(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, batch_id: UUID
) -> Batch | None:
    """A batch with its present counters, or None."""
    return await _batch_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, batch_id=batch_id
    )


async def page(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    before: UUID | None,
    only: Only,
    most: int,
) -> list[Batch]:
    """Batches of an environment that are wanted, newest first, those below ``before``."""
    return await _batches_page.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        before=before,
        statuses=list(only.statuses) or None,
        types=list(only.types) or None,
        name=only.name,
        created_from=only.created_from,
        created_before=only.created_before,
        resource_id=only.resource_id,
        api_key_id=only.api_key_id,
        metadata=Jsonb(dict(only.metadata)),
        most=most,
    )


async def resource_ids(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> list[UUID]:
    """The resources that a batch uses."""
    rows = await _batch_resources.all(conn, workspace_id=workspace_id, batch_id=batch_id)
    return [row.resource_id for row in rows]


async def resource_ids_of(
    conn: Connection, *, workspace_id: UUID, batch_ids: Sequence[UUID], reader_id: UUID | None
) -> dict[UUID, list[UUID]]:
    """The resources that each of some batches asked, which a key must be allowed to see it.

    An alternate counts as its owner. What was deleted is left out for the key that created the batch:
    it was stripped from every allowlist, and what was answered stays readable.
    """
    rows = await _batches_resources.all(
        conn, workspace_id=workspace_id, batch_ids=list(batch_ids), reader_id=reader_id
    )
    return {row.batch_id: row.resource_ids for row in rows}


async def redrive(
    conn: Connection,
    *,
    workspace_id: UUID,
    batch_id: UUID,
    statuses: Sequence[Status] = ("failed",),
    seqs: Sequence[int] | None = None,
    codes: Sequence[str] | None = None,
    before: datetime | None = None,
    most: int = 5000,
) -> int:
    """Put up to ``most`` failed or cancelled items back in line; how many.

    ``seqs``, ``codes``: only these numbers, only those that ended with one of these errors. A
    caller who repeats it until nothing is left says ``before``, or what fails again is put back
    again. A cancelled batch is left alone unless ``statuses`` has cancelled and it has ended.
    """
    row = await _redrive.one(
        conn,
        workspace_id=workspace_id,
        batch_id=batch_id,
        statuses=list(statuses),
        seqs=None if seqs is None else list(seqs),
        codes=None if codes is None else list(codes),
        before=before,
        most=most,
    )
    return row.redriven


async def pause(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> None:
    """Let claims pass a batch by until ``resume``; calls in flight are let finish."""
    await _flows_pause.run(conn, workspace_id=workspace_id, batch_id=batch_id)


async def resume(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> list[UUID]:
    """Let claims see a batch again, and look at its resources now: the ids to ring for.

    Harmless for a batch that is not paused; then it makes changed limits count at once.
    """
    await _flows_resume.run(conn, workspace_id=workspace_id, batch_id=batch_id)
    await _batch_unpause.run(conn, workspace_id=workspace_id, batch_id=batch_id)
    found = sorted(await resource_ids(conn, workspace_id=workspace_id, batch_id=batch_id))
    await _ready_now.run(conn, workspace_id=workspace_id, resource_ids=found)
    return found


def budget(max_tokens: int | None, max_cost_nano: int | None) -> list[Amount]:
    """What a batch may use in its life, as a limit on its own scope."""
    if max_tokens is None and max_cost_nano is None:
        return []
    return [Amount(period="lifetime", tokens=max_tokens, cost_nano=max_cost_nano)]


async def exhausted(conn: Connection) -> list[Exhausted]:
    """Batches that may have spent what they may, of all workspaces."""
    return await _batches_exhausted.all(conn)


async def pause_exhausted(conn: Connection, *, batch: Exhausted) -> bool:
    """Pause a batch if it has spent what it may and nothing of it is out; whether it did."""
    done = await _batch_pause_exhausted.one(
        conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
    )
    return done.paused


async def clock(conn: Connection) -> datetime:
    """The database's present."""
    return (await _now.one(conn)).now


def ended(batch_id: UUID, status: str) -> ConflictError:
    """The refusal of what an ended batch does not take."""
    return ConflictError(
        f"Completion Batch {batch_id} has already ended: {status.upper()}",
        code="BATCH_ALREADY_ENDED",
        details={"status": status.upper()},
    )


async def hold(
    conn: Connection, *, workspace_id: UUID, batch_id: UUID, even_ended: bool = False
) -> Steering:
    """Lock a batch until the commit: its limits' mutex, its flows, its row; what steers it now.

    Raises ConflictError when it has ended or was cancelled, after which nothing steers it; unless
    ``even_ended``, for what is to count when some of it is tried again.
    """
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=batch_id)
    await _flows_lock.run(conn, workspace_id=workspace_id, batch_id=batch_id)
    held = await _batch_lock.one(conn, workspace_id=workspace_id, batch_id=batch_id)
    if held.status in TERMINAL and not even_ended:
        raise ended(batch_id, held.status)
    return Steering(
        priority=held.priority,
        weight=held.weight,
        expires_at=held.expires_at,
        capacity=held.capacity,
        max_tokens=held.max_tokens,
        max_cost_nano=held.max_cost_nano,
        currency=held.currency,
        pause_reason=held.pause_reason,
    )


async def steer(
    conn: Connection,
    *,
    workspace_id: UUID,
    batch_id: UUID,
    to: Steering,
    amounts: Sequence[Amount] | None = None,
) -> list[UUID]:
    """Change what steers a batch that is held, effective at the next claim; whom to ring for.

    ``amounts``: its limits from now on; what was used of limits that it keeps stays used. None: as
    they are.
    """
    await _flows_steer.run(
        conn,
        workspace_id=workspace_id,
        batch_id=batch_id,
        priority=to.priority,
        weight=to.weight,
        expires_at=to.expires_at,
    )
    await _batch_change.run(
        conn,
        workspace_id=workspace_id,
        batch_id=batch_id,
        priority=to.priority,
        weight=to.weight,
        expires_at=to.expires_at,
        capacity=Jsonb(to.capacity),
        max_tokens=to.max_tokens,
        max_cost_nano=to.max_cost_nano,
        currency=to.currency,
    )
    if amounts:
        await capacity.open_scope(
            conn, workspace_id=workspace_id, scope_id=batch_id, kind="batch", amounts=amounts
        )
        await _batch_budget_seed.one(conn, workspace_id=workspace_id, batch_id=batch_id)
    elif amounts is not None:
        await capacity.set_limits(conn, workspace_id=workspace_id, scope_id=batch_id, amounts=())
    found = sorted(await resource_ids(conn, workspace_id=workspace_id, batch_id=batch_id))
    await _ready_now.run(conn, workspace_id=workspace_id, resource_ids=found)
    return found


async def of_run(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, run: str
) -> list[RunBatch]:
    """The batches of a run of the command line, by generation and in the order of their rows."""
    return await _run_batches.all(
        conn, workspace_id=workspace_id, environment_id=environment_id, run=run
    )
