"""The queue: claim, settle, reclaim, and the workers that hold leases.

The states of an item and the verbs between them:

    pending ──claim──▶ running ──complete──▶ completed
       ▲                 │ ├────fail──────▶ failed      (rejected, exhausted, crashed, impossible)
       ├──retry──────────┤ │
       ├──release────────┤ └── cancel ────▶ cancelled
       └──reclaim────────┘

claim      take it, under a lease, with a reservation in the ledger; attempt + 1
complete   an answer was recorded; the first one wins, whatever its attempt
fail       a final refusal, the last allowed failure, or the last allowed crash
retry      a failure (failures + 1) or a throttle (free) sends it back, visible later
release    known to be unsent: back at once, reservation refunded, nothing burned
reclaim    its worker vanished: back, the attempt is noted as lost (crashes + 1)
cancel     by its batch; a call in flight is let finish and its answer kept, or it is cut

Domain functions take ``conn`` first and never commit. What is made for every call is a ``Struct`` of
msgspec, which costs a tenth of a dataclass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Literal
from uuid import UUID

import msgspec

from app.db import Connection, NoRow, Query

#: Sqlstates that say that another verb crossed this one: nothing happened, ask again.
CROSSED = frozenset({"SLCLO", "40P01", "40001"})

#: What a resource's next item waits for; see the comment on the database's wait_reason.
WaitReason = Literal["capacity", "pace", "concurrency", "cooldown", "retry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A resource that may have claimable work at ``next_at`` (``now``: the database's clock)."""

    workspace_id: UUID
    resource_id: UUID
    next_at: datetime
    now: datetime


class _Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a claim: an item, or (``seq`` is None) the report that ends it.

    In the report all other fields are None, whatever their types say here.
    """

    flow: int
    seq: int | None
    attempt: int
    failures: int
    max_attempts: int
    input_tokens: int
    output_tokens: int
    expected_output_tokens: int
    impossible: bool
    timeout_ms: int | None
    body: str
    report: str


class _Flow(msgspec.Struct, frozen=True, kw_only=True):
    """What the items of one flow have in common in a claim's report."""

    flow: int
    batch_day: date
    batch_id: UUID
    endpoint: str
    limit_ids: tuple[UUID, ...]


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a claim."""

    claimed_at: datetime
    flows: list[_Flow]
    is_limited: bool
    busy: bool
    isolated: bool
    next_at: datetime | None = None
    reason: WaitReason | None = None
    waits_for: UUID | None = None
    config_at: datetime


class Item(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An item under lease: what to ask, and what its claim reserved.

    ``is_limited``: some limit counts it, so its call must leave soon after the claim, or not at all.
    ``timeout_ms``: the longest time of its call; None: that of its resource.
    """

    workspace_id: UUID
    resource_id: UUID
    batch_day: date
    batch_id: UUID
    seq: int
    attempt: int
    failures: int
    max_attempts: int
    input_tokens: int
    output_tokens: int
    expected_output_tokens: int
    impossible: bool
    endpoint: str
    body: str
    claimed_at: datetime
    limit_ids: tuple[UUID, ...]
    is_limited: bool = False
    timeout_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A running item of a worker, as the database knows it."""

    workspace_id: UUID
    resource_id: UUID
    batch_day: date
    batch_id: UUID
    seq: int
    attempt: int
    failures: int
    max_attempts: int
    input_tokens: int
    output_tokens: int
    expected_output_tokens: int
    claimed_at: datetime
    limit_ids: list[UUID]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a claim brought, and when it is worth coming back.

    ``wait_s``: seconds until a look may find more; 0 at once, None when nothing waits. ``busy``:
    another worker was claiming from the same resource, or from a batch or key with limits.
    ``isolated``: an item that was in flight at many crashes waits for a worker that has nothing else
    to do. ``reason``: what the next item waits for. ``config_at``: when the resource or its
    connection was last changed.
    """

    items: list[Item]
    wait_s: float | None
    busy: bool
    isolated: bool
    config_at: datetime | None
    reason: WaitReason | None = None
    waits_for: UUID | None = None


class Outcome(StrEnum):
    """How a call ended, as recorded; see the comment on the database's attempt_outcome."""

    answered = "answered"
    rejected = "rejected"
    throttled = "throttled"
    unreachable = "unreachable"
    unsent = "unsent"
    impossible = "impossible"
    lost = "lost"


class Settlement(msgspec.Struct, kw_only=True):
    """One outcome on its way into the database.

    ``wait_s``: how long the item (throttled: the whole resource) stays back. ``refund``: the call
    is known not to have been sent. The body travels beside it, see ``settle``.
    """

    batch_day: date
    batch_id: UUID
    resource_id: UUID
    connection_id: UUID | None
    seq: int
    attempt: int
    outcome: Outcome
    claimed_at: datetime
    limit_ids: tuple[UUID, ...]
    reserved_input_tokens: int
    reserved_output_tokens: int
    expected_output_tokens: int
    refund: bool
    started_at: datetime | None = None
    ended_at: datetime | None = None
    latency_ms: int | None = None
    wait_s: float | None = None
    status_code: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    model: str | None = None
    request_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    headers: dict[str, str] | None = None


class Observation(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a reply stated of a provider's limit: so many of a kind per period, so many used."""

    resource_id: UUID
    kind: Literal["requests", "tokens", "input_tokens", "output_tokens"]
    period: Literal["minute", "hour", "day", "month"]
    limit: int
    used: int | None = None


class _Call(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What of a settlement differs from call to call."""

    outcome: Outcome
    refund: bool
    reserved_input_tokens: int
    reserved_output_tokens: int
    expected_output_tokens: int
    started_at: datetime | None = None
    ended_at: datetime | None = None
    latency_ms: int | None = None
    wait_s: float | None = None
    status_code: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    request_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    headers: dict[str, str] | None = None


class _Grant(msgspec.Struct, kw_only=True):
    """Calls of one batch that were claimed together and answered by one model, column by column.

    ``ords``: see sql/functions/settle.sql.
    """

    batch_day: date
    batch_id: UUID
    resource_id: UUID
    connection_id: UUID | None
    claimed_at: datetime
    limit_ids: tuple[UUID, ...]
    model: str | None
    ords: list[int]
    seqs: list[int]
    attempts: list[int]
    calls: list[_Call]


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one outcome; not ``settled``: its item was locked, bring it again.

    ``wakes``: the settlement gave workers something to do that they do not know of; ring for it.
    """

    ord: int
    settled: bool
    batch_id: UUID
    resource_id: UUID
    becomes: str | None
    wakes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Lapsed:
    """A running item whose worker is dead or whose lease has passed."""

    workspace_id: UUID
    batch_day: date
    batch_id: UUID
    seq: int
    attempt: int
    alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A worker of the same machine that has not said goodbye."""

    worker_id: UUID
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmarked:
    """A cancelled batch whose item rows do not all say so yet."""

    workspace_id: UUID
    batch_day: date
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """A flow whose deadline has passed while items of it still wait."""

    workspace_id: UUID
    batch_day: date
    batch_id: UUID
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowFloor:
    """Items that a floor has passed: always a bug."""

    workspace_id: UUID
    batch_id: UUID
    resource_id: UUID
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Aborted:
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    unsettled: list[int]
    becomes: list[str | None] | None
    wakes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reclaimed:
    reclaimed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marked:
    marked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expired:
    expired: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    status: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    holder_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    made: bool


_ready_due = Query("queue", "ready_due", Due)
_claim = Query("queue", "item_claim", _Claimed)
_held_by = Query("queue", "items_held_by", Held)
_settle = Query("queue", "item_settle", _Outcome)
_lapsed = Query("queue", "items_lapsed", Lapsed)
_reclaim = Query("queue", "items_reclaim", _Reclaimed)
_cancel = Query("queue", "batch_cancel", _Status)
_cancel_chunk = Query("queue", "batch_cancel_chunk", _Marked)
_aborted = Query("queue", "batches_aborted", _Aborted)
_unmarked = Query("queue", "batches_unmarked", Unmarked)
_flows_expired = Query("queue", "flows_expired", Expired)
_flow_expire = Query("queue", "flow_expire", _Expired)
_ready_recompute = Query("queue", "ready_recompute", NoRow)
_below_floor = Query("queue", "items_below_floor", BelowFloor)
_worker_register = Query("queue", "worker_register", NoRow)
_worker_heartbeat = Query("queue", "worker_heartbeat", NoRow)
_worker_stop = Query("queue", "worker_stop", NoRow)
_workers_of_machine = Query("queue", "workers_of_machine", Neighbour)
_worker_died = Query("queue", "worker_died", NoRow)
_workers_forget = Query("queue", "workers_forget", NoRow)
_lease_take = Query("queue", "lease_take", _Holder)
_lease_release = Query("queue", "lease_release", NoRow)
_ledger_prune = Query("queue", "ledger_prune", NoRow)
_partitions_ensure = Query("queue", "partitions_ensure", _Made)

_encode = msgspec.json.Encoder().encode
_report = msgspec.json.Decoder(_Report).decode


async def due(conn: Connection, *, most: int = 1000) -> list[Due]:
    """Resources with work, soonest first."""
    return await _ready_due.all(conn, most=most)


async def claim(
    conn: Connection,
    *,
    workspace_id: UUID,
    resource_id: UUID,
    worker_id: UUID,
    want: int,
    alone: bool,
    guard_s: float,
    grace_s: float,
    burst_s: float,
    slow_start: int,
) -> Claim:
    """Take at most ``want`` items of a resource, as many as its limits allow now.

    ``burst_s``: seconds of a limit's even rate that may go at once; 60: a whole minute.
    ``slow_start``: calls at once of a model that nobody knows a limit of; 0: any number.
    ``alone``: the worker has nothing in flight, so it may take an item suspected of crashing
    workers. Raises psycopg.Error with sqlstate SLCLO when a cancel or pause crossed it: ask again.
    """
    rows = await _claim.all(
        conn,
        workspace_id=workspace_id,
        resource_id=resource_id,
        worker_id=worker_id,
        want=want,
        alone=alone,
        guard_s=guard_s,
        grace_s=grace_s,
        burst_s=burst_s,
        slow_start=slow_start,
    )
    if not rows:
        return Claim(items=[], wait_s=None, busy=False, isolated=False, config_at=None)
    report = _report(rows.pop().report)
    flows = {flow.flow: flow for flow in report.flows}
    wait_s = None
    if report.next_at is not None:
        wait_s = max((report.next_at - report.claimed_at).total_seconds(), 0.0)
    return Claim(
        items=[
            Item(
                workspace_id=workspace_id,
                resource_id=resource_id,
                batch_day=(flow := flows[row.flow]).batch_day,
                batch_id=flow.batch_id,
                seq=row.seq,
                attempt=row.attempt,
                failures=row.failures,
                max_attempts=row.max_attempts,
                input_tokens=row.input_tokens,
                output_tokens=row.output_tokens,
                expected_output_tokens=row.expected_output_tokens,
                impossible=row.impossible,
                endpoint=flow.endpoint,
                body=row.body,
                claimed_at=report.claimed_at,
                limit_ids=() if row.impossible else flow.limit_ids,
                is_limited=report.is_limited,
                timeout_ms=row.timeout_ms,
            )
            for row in rows
            if row.seq is not None
        ],
        wait_s=wait_s,
        busy=report.busy,
        isolated=report.isolated,
        config_at=report.config_at,
        reason=report.reason,
        waits_for=report.waits_for,
    )


async def held_by(conn: Connection, *, worker_id: UUID) -> list[Item]:
    """What a worker holds, for finding a claim whose answer was lost on the way."""
    return [
        Item(
            workspace_id=held.workspace_id,
            resource_id=held.resource_id,
            batch_day=held.batch_day,
            batch_id=held.batch_id,
            seq=held.seq,
            attempt=held.attempt,
            failures=held.failures,
            max_attempts=held.max_attempts,
            input_tokens=held.input_tokens,
            output_tokens=held.output_tokens,
            expected_output_tokens=held.expected_output_tokens,
            impossible=False,
            endpoint="",
            body="",
            claimed_at=held.claimed_at,
            limit_ids=tuple(held.limit_ids),
        )
        for held in await _held_by.all(conn, worker_id=worker_id)
    ]


async def settle(
    conn: Connection,
    *,
    workspace_id: UUID,
    worker_id: UUID,
    settlements: Sequence[Settlement],
    bodies: Sequence[str | None],
    observed: Sequence[Observation] = (),
    rest_s: float = 1.0,
    rest_most_s: float = 60.0,
) -> list[Settled]:
    """Record outcomes of one workspace, any number of batches, in this transaction.

    Returns one row per settlement, whose ``ord`` is its position from 1; those whose item was
    locked by somebody else are not settled and must be brought again. Repeating a settlement is
    harmless. ``bodies[n]`` is the provider's JSON text of ``settlements[n]``. ``observed``: what the
    replies stated of limits, the latest of each kind. ``rest_s``: how long a model rests that refused
    without saying how long, doubled with each refusal in a row up to ``rest_most_s``.
    """
    # In the order of the items' keys, in which their rows are locked.
    order = sorted(range(len(settlements)), key=lambda n: _place(settlements[n]))
    found = await _settle.one(
        conn,
        workspace_id=workspace_id,
        worker_id=worker_id,
        outcomes=_encode(_grants(settlements[n] for n in order)).decode(),
        bodies=[bodies[n] for n in order],
        observed=_encode(observed).decode() if observed else None,
        rest_s=rest_s,
        rest_most_s=rest_most_s,
    )
    becomes = dict(zip(order, found.becomes or (), strict=True))
    unsettled = {order[position - 1] for position in found.unsettled}
    return [
        Settled(
            ord=n + 1,
            settled=n not in unsettled,
            batch_id=settlement.batch_id,
            resource_id=settlement.resource_id,
            becomes=becomes[n],
            wakes=found.wakes,
        )
        for n, settlement in enumerate(settlements)
    ]


def _place(of: Settlement) -> tuple[date, int, int, int]:
    return of.batch_day, of.batch_id.int, of.seq, of.attempt


def _grants(ordered: Iterable[Settlement]) -> list[_Grant]:
    """What calls have in common, said once; their ``ord`` is their place from 1."""
    grants: dict[tuple[object, ...], _Grant] = {}
    for position, one in enumerate(ordered, start=1):
        key = (
            one.batch_id,
            one.claimed_at,
            one.model,
            one.resource_id,
            one.connection_id,
            one.limit_ids,
        )
        if (grant := grants.get(key)) is None:
            grant = grants[key] = _Grant(
                batch_day=one.batch_day,
                batch_id=one.batch_id,
                resource_id=one.resource_id,
                connection_id=one.connection_id,
                claimed_at=one.claimed_at,
                limit_ids=one.limit_ids,
                model=one.model,
                ords=[],
                seqs=[],
                attempts=[],
                calls=[],
            )
        grant.ords.append(position)
        grant.seqs.append(one.seq)
        grant.attempts.append(one.attempt)
        grant.calls.append(
            _Call(
                outcome=one.outcome,
                refund=one.refund,
                reserved_input_tokens=one.reserved_input_tokens,
                reserved_output_tokens=one.reserved_output_tokens,
                expected_output_tokens=one.expected_output_tokens,
                started_at=one.started_at,
                ended_at=one.ended_at,
                latency_ms=one.latency_ms,
                wait_s=one.wait_s,
                status_code=one.status_code,
                error_code=one.error_code,
                error_message=one.error_message,
                request_id=one.request_id,
                input_tokens=one.input_tokens,
                output_tokens=one.output_tokens,
                cached_tokens=one.cached_tokens,
                reasoning_tokens=one.reasoning_tokens,
                headers=one.headers,
            )
        )
    return list(grants.values())


async def lapsed(
    conn: Connection, *, quiet_since: datetime, dead_after_s: float, most: int = 5000
) -> list[Lapsed]:
    """Running items to reclaim; ``quiet_since``: since when this process has heard the database."""
    return await _lapsed.all(conn, quiet_since=quiet_since, dead_after_s=dead_after_s, most=most)


async def reclaim(
    conn: Connection, *, items: Sequence[Lapsed], max_crashes: int, wait_s: float
) -> int:
    """Bring back items of ONE batch; how many there still were to bring back."""
    first = items[0]
    row = await _reclaim.one(
        conn,
        workspace_id=first.workspace_id,
        batch_day=first.batch_day,
        batch_id=first.batch_id,
        seqs=[i.seq for i in items],
        attempts=[i.attempt for i in items],
        alone=[i.alone for i in items],
        max_crashes=max_crashes,
        wait_s=wait_s,
    )
    return row.reclaimed


async def cancel(
    conn: Connection, *, workspace_id: UUID, batch_id: UUID, abort: bool = False
) -> str | None:
    """Close a batch: from this commit on nothing of it is claimed. Its status, None if absent.

    ``abort``: calls in flight are cut, by ``cancel_chunk`` and by the workers that are rung for.
    """
    row = await _cancel.one(conn, workspace_id=workspace_id, batch_id=batch_id, abort=abort)
    return row.status


async def cancel_chunk(
    conn: Connection, *, workspace_id: UUID, batch_day: date, batch_id: UUID, most: int = 2000
) -> int:
    """Mark some items of a cancelled batch, those of calls to be cut first; how many."""
    row = await _cancel_chunk.one(
        conn, workspace_id=workspace_id, batch_day=batch_day, batch_id=batch_id, most=most
    )
    return row.marked


async def aborted(conn: Connection, *, of: Iterable[tuple[UUID, UUID]]) -> set[UUID]:
    """Which of these batches (workspace, batch) want their calls cut."""
    asked = sorted(of)
    rows = await _aborted.all(
        conn, workspace_ids=[w for w, _ in asked], batch_ids=[b for _, b in asked]
    )
    return {row.batch_id for row in rows}


async def expired(conn: Connection, *, most: int = 100) -> list[Expired]:
    """Flows whose deadline has passed and whose items must still follow."""
    return await _flows_expired.all(conn, most=most)


async def expire(conn: Connection, *, flow: Expired, most: int = 2000) -> int:
    """End some items of a flow whose deadline has passed; how many.

    Raises psycopg.Error with sqlstate SLCLO when a cancel or a new deadline crossed it.
    """
    row = await _flow_expire.one(
        conn,
        workspace_id=flow.workspace_id,
        batch_day=flow.batch_day,
        batch_id=flow.batch_id,
        resource_id=flow.resource_id,
        most=most,
    )
    return row.expired


async def unmarked(conn: Connection, *, most: int = 100) -> list[Unmarked]:
    """Cancelled batches whose rows must still follow."""
    return await _unmarked.all(conn, most=most)


async def recompute_ready(conn: Connection) -> int:
    """Wake resources whose work would otherwise wait unseen; how many (0 unless there is a bug)."""
    return await _ready_recompute.run(conn)


async def below_floor(conn: Connection) -> list[BelowFloor]:
    """Violations of the floor's promise; always empty."""
    return await _below_floor.all(conn)


async def register_worker(
    conn: Connection, *, worker_id: UUID, host: str, machine: str, pid: int, version: str
) -> None:
    """Note that a worker begins."""
    await _worker_register.run(
        conn, worker_id=worker_id, host=host, machine=machine, pid=pid, version=version
    )


async def heartbeat(conn: Connection, *, worker_id: UUID, in_flight: int) -> None:
    """Note that a worker lives."""
    await _worker_heartbeat.run(conn, worker_id=worker_id, in_flight=in_flight)


async def stop_worker(conn: Connection, *, worker_id: UUID) -> None:
    """Note that a worker has stopped by itself."""
    await _worker_stop.run(conn, worker_id=worker_id)


async def neighbours(conn: Connection, *, machine: str) -> list[Neighbour]:
    """Workers whose process ids mean something here."""
    return await _workers_of_machine.all(conn, machine=machine)


async def note_death(conn: Connection, *, worker_id: UUID) -> None:
    """Note that a worker's process is gone: its items may be reclaimed at once."""
    await _worker_died.run(conn, worker_id=worker_id)


async def forget_workers(conn: Connection) -> int:
    """Drop rows of workers long gone."""
    return await _workers_forget.run(conn)


async def take_duty(conn: Connection, *, name: str, holder_id: UUID, for_s: float) -> bool:
    """Become or stay the one process that does this duty."""
    row = await _lease_take.one_or_none(conn, name=name, holder_id=holder_id, for_s=for_s)
    return row is not None


async def release_duty(conn: Connection, *, name: str, holder_id: UUID) -> None:
    """Leave a duty to another process."""
    await _lease_release.run(conn, name=name, holder_id=holder_id)


async def prune_ledger(conn: Connection, *, keep_hours: int) -> int:
    """Forget old ledger slots."""
    return await _ledger_prune.run(conn, keep_hours=keep_hours)


async def ensure_partitions(conn: Connection, *, day: date) -> bool:
    """Make the partitions of a day if they are missing."""
    return (await _partitions_ensure.one(conn, day=day)).made
