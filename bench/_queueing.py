"""The engine without HTTP: claim and settle as a worker does, with outcomes made in process.

And the same rows without the engine, and two UPDATEs without the rows: what a Postgres could do at
most on this machine with this driver. All of them are driven alike: one connection claims while
another one records what was claimed before.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, LiteralString, TypeVar
from uuid import UUID

import psycopg

from app import queue
from app.batches import Batch
from app.capacity import Amount
from app.db import Connection
from app.ids import uuid7
from app.intake import NewBatch
from app.queue import Item, Outcome, Settlement
from bench._rig import Rig
from bench.http_clients import ANSWER

#: Limits that are counted and never bind.
AMPLE = [Amount(period="minute", requests=10**9, tokens=10**13)]
HEADERS = {"x-request-id": "req_bench", "x-ratelimit-remaining-requests": "1"}
_BODY = ANSWER.decode()

Claimer = Callable[[Connection], Awaitable[list[Any]]]
Recorder = Callable[[Connection, list[Any]], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Drive:
    """How long so many items took; ``claims_ms``: each claim; ``marks``: (items, seconds) on the way."""

    items: int = 0
    seconds: float = 0.0
    claims_ms: list[float] = field(default_factory=list[float])
    marks: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    @property
    def rate(self) -> float:
        """Items per second from the first claim to the last commit."""
        return self.items / self.seconds


#: As the verbs have them: plans that do not depend on statistics, which lag behind in a new table.
PLANS = "set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off"


async def drive(url: str, claim: Claimer, record: Recorder, *, most: int | None = None) -> Drive:
    """Claim on one connection, record on another, until nothing or ``most`` items were claimed.

    A first claim and its recording come before the clock: a worker's connections have planned their statements.
    """
    done = Drive()
    handed: asyncio.Queue[list[Any] | None] = asyncio.Queue(2)
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as claiming,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as recording,
    ):
        await claiming.execute(PLANS)
        await recording.execute(PLANS)

        async def recorder() -> None:
            while (some := await handed.get()) is not None:
                await record(recording, some)
                done.items += len(some)
                done.marks.append((done.items, time.perf_counter() - begun))

        await record(recording, await claim(claiming))
        begun = time.perf_counter()
        writing = asyncio.create_task(recorder())
        claimed = 0
        while most is None or claimed < most:
            before = time.perf_counter()
            some = await claim(claiming)
            if not some:
                break
            done.claims_ms.append((time.perf_counter() - before) * 1000)
            claimed += len(some)
            await handed.put(some)
        await handed.put(None)
        await writing
        done.seconds = time.perf_counter() - begun
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A tenant's resource, claimed from and settled as a worker does."""

    workspace_id: UUID
    resource_id: UUID
    connection_id: UUID
    worker_id: UUID = field(default_factory=uuid7)
    want: int = 500

    @classmethod
    async def make(
        cls, rig: Rig, *, name: str = "engine", want: int = 500, amounts: Sequence[Amount] = AMPLE
    ) -> "Engine":
        """A resource of its own with limits that never bind, unless others are given."""
        connection_id = await rig.create_connection(name, AMPLE)
        resource_id = await rig.create_resource(name, amounts, connection_id=connection_id)
        return cls(
            workspace_id=rig.ids["workspace_id"],
            resource_id=resource_id,
            connection_id=connection_id,
            want=want,
        )

    async def claim(self, conn: Connection) -> list[Item]:
        """A transaction that takes items; asks again where a cancel crossed it."""
        async with conn.transaction():
            found = await queue.claim(
                conn,
                workspace_id=self.workspace_id,
                resource_id=self.resource_id,
                worker_id=self.worker_id,
                want=self.want,
                alone=False,
                guard_s=1.0,
                grace_s=30.0,
                burst_s=60.0,
                slow_start=0,
            )
        return found.items

    async def record(self, conn: Connection, items: list[Item]) -> None:
        """A transaction that settles them as answered."""
        async with conn.transaction():
            settled = await queue.settle(
                conn,
                workspace_id=self.workspace_id,
                worker_id=self.worker_id,
                settlements=[self.answered(item) for item in items],
                bodies=[_BODY] * len(items),
            )
        assert all(row.settled for row in settled)

    def answered(self, item: Item) -> Settlement:
        """What a worker would report of it."""
        ended_at = datetime.now(UTC)  # noqa: TID251 - as the worker does
        return Settlement(
            batch_day=item.batch_day,
            batch_id=item.batch_id,
            resource_id=item.resource_id,
            connection_id=self.connection_id,
            seq=item.seq,
            attempt=item.attempt,
            outcome=Outcome.answered,
            claimed_at=item.claimed_at,
            limit_ids=item.limit_ids,
            reserved_input_tokens=item.input_tokens,
            reserved_output_tokens=item.output_tokens,
            expected_output_tokens=item.expected_output_tokens,
            refund=False,
            started_at=ended_at,
            ended_at=ended_at,
            latency_ms=200,
            status_code=200,
            model="sluice-bench",
            request_id="req_bench",
            input_tokens=100,
            output_tokens=30,
            headers=HEADERS,
        )


# The same rows, without ledger and flows ----------------------------------------------------------

_PLAIN_CLAIM: LiteralString = """
with picked as (
    select i.workspace_id, i.batch_day, i.batch_id, i.seq
    from items i
    where i.workspace_id = %(workspace_id)s and i.batch_day = %(batch_day)s and i.batch_id = %(batch_id)s
        and i.resource_id = %(resource_id)s and i.status = 'pending' and i.attempt = 0 and i.seq >= %(floor)s
    order by i.seq
    limit %(want)s
    for no key update skip locked
), updated as (
    update items i
    set status = 'running', visible_at = clock_timestamp() + interval '5 minutes', attempt = i.attempt + 1,
        worker_id = %(worker_id)s, claimed_at = clock_timestamp(), reserved_limits = %(limit_ids)s,
        reserved_input_tokens = 100, reserved_output_tokens = 64, expected_output_tokens = 30
    from picked p
    where i.workspace_id = p.workspace_id and i.batch_day = p.batch_day and i.batch_id = p.batch_id
        and i.seq = p.seq
    returning i.workspace_id, i.batch_day, i.batch_id, i.seq
), told as (
    insert into events (workspace_id, batch_day, batch_id, first_no, last_no, kind, at, seqs)
    select %(workspace_id)s, %(batch_day)s, %(batch_id)s, 2 * %(floor)s + 2, 2 * %(floor)s + 1 + count(*),
        'item-running', clock_timestamp(), array_agg(seq order by seq)
    from updated
    having count(*) > 0
)
select u.seq, q.body::text
from updated u
join item_requests q on q.workspace_id = u.workspace_id and q.batch_day = u.batch_day
    and q.batch_id = u.batch_id and q.seq = u.seq
order by u.seq
"""
_PLAIN_RECORD: LiteralString = """
with given as (select unnest(%(seqs)s::int[]) as seq),
written as (
    insert into attempts (workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, connection_id,
        worker_id, claimed_at, started_at, ended_at, latency_ms, status_code, model, provider_request_id,
        reserved_limits, reserved_input_tokens, reserved_output_tokens, charged_requests, charged_input_tokens,
        charged_output_tokens, expected_output_tokens)
    select %(workspace_id)s, %(batch_day)s, %(batch_id)s, seq, 1, 'answered', %(resource_id)s,
        %(connection_id)s, %(worker_id)s, now(), now(), now(), 200, 200, 'sluice-bench', 'req_bench',
        %(limit_ids)s, 100, 64, 1, 100, 30, 30
    from given
), answered as (
    insert into item_results (workspace_id, batch_day, batch_id, seq, attempt, ended_at, status_code,
        input_tokens, output_tokens, model, headers, body)
    select %(workspace_id)s, %(batch_day)s, %(batch_id)s, seq, 1, now(), 200, 100, 30, 'sluice-bench',
        %(headers)s::jsonb, (%(bodies)b::text[])[row_number() over ()]::json
    from given
), told as (
    insert into events (workspace_id, batch_day, batch_id, first_no, last_no, kind, at, seqs)
    select %(workspace_id)s, %(batch_day)s, %(batch_id)s, 2 * min(seq) + count(*) + 2,
        2 * min(seq) + 2 * count(*) + 1, 'item-completed', now(), array_agg(seq order by seq)
    from given
)
update items i
set status = 'completed', ended_reason = 'answered', ended_at = now(), worker_id = null, claimed_at = null,
    reserved_limits = null, reserved_input_tokens = null, reserved_output_tokens = null,
    expected_output_tokens = null
from (select *, %(workspace_id)s::uuid as workspace_id from given) g
where i.workspace_id = g.workspace_id and i.batch_day = %(batch_day)s and i.batch_id = %(batch_id)s
    and i.seq = g.seq
"""


@dataclass(slots=True, kw_only=True)
class PlainRows:
    """The rows of a batch as the engine writes them, but no ledger, no flows, no limits, no order."""

    batch: NewBatch | Batch
    engine: Engine
    floor: int = 0

    def _ids(self) -> dict[str, object]:
        return {
            "workspace_id": self.engine.workspace_id,
            "batch_day": self.batch.batch_day,
            "batch_id": self.batch.batch_id,
            "resource_id": self.engine.resource_id,
            "connection_id": self.engine.connection_id,
            "worker_id": self.engine.worker_id,
            "limit_ids": [self.engine.resource_id, self.engine.connection_id],
        }

    async def claim(self, conn: Connection) -> list[int]:
        """Numbers of the items that it marked as running."""
        async with conn.transaction():
            rows = await (
                await conn.execute(
                    _PLAIN_CLAIM, self._ids() | {"floor": self.floor, "want": self.engine.want}
                )
            ).fetchall()
        self.floor += len(rows)
        return [row[0] for row in rows]

    async def record(self, conn: Connection, seqs: list[int]) -> None:
        """Write attempt, result, event and end of each."""
        async with conn.transaction():
            await conn.execute(
                _PLAIN_RECORD,
                self._ids()
                | {"seqs": seqs, "bodies": [_BODY] * len(seqs), "headers": json.dumps(HEADERS)},
            )


# Two UPDATEs --------------------------------------------------------------------------------------

_BARE_FILL: LiteralString = """
drop table if exists bare;
create table bare (id bigint primary key, status int not null default 0, body text);
create index bare_pending on bare (id) where status = 0;
"""
_BARE_CLAIM: LiteralString = """
update bare b set status = 1
from (
    select id from bare where status = 0 and id >= %(floor)s order by id limit %(want)s for update skip locked
) p
where b.id = p.id
returning b.id, b.body
"""
_BARE_RECORD: LiteralString = "update bare set status = 2 where id = any (%s)"


@dataclass(slots=True, kw_only=True)
class Bare:
    """A table of ids and states: claimed by one UPDATE, acknowledged by another one, no answer kept."""

    want: int = 500
    floor: int = 0

    @classmethod
    async def fill(cls, rig: Rig, items: int, *, body: bytes | None) -> "Bare":
        """So many rows, which carry a request or only their number."""
        async with rig.db.connection() as conn:
            await conn.execute(_BARE_FILL)
            await conn.execute(
                "insert into bare (id, body) select n, %s::text from generate_series(1, %s) n",
                (None if body is None else body.decode(), items),
            )
            await conn.execute("vacuum analyze bare")
        return cls()

    async def claim(self, conn: Connection) -> list[int]:
        """Ids."""
        rows = await (
            await conn.execute(_BARE_CLAIM, {"floor": self.floor, "want": self.want})
        ).fetchall()
        self.floor = max((row[0] for row in rows), default=self.floor)
        return [row[0] for row in rows]

    async def record(self, conn: Connection, ids: list[int]) -> None:
        """Done."""
        await conn.execute(_BARE_RECORD, (ids,))


# WAL ----------------------------------------------------------------------------------------------

Made = TypeVar("Made")


async def wal_of(
    conn: Connection, act: Callable[[Connection], Awaitable[Made]]
) -> tuple[Made, int]:
    """What an action brings, and the bytes of WAL that this backend wrote meanwhile."""
    before = await _wal_written(conn)
    made = await act(conn)
    return made, await _wal_written(conn) - before


async def _wal_written(conn: Connection) -> int:
    """Bytes; from Postgres 18 on of this backend alone."""
    if conn.info.server_version < 180000:
        found = await conn.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")
    else:
        await conn.execute("select pg_stat_force_next_flush()")
        found = await conn.execute(
            "select wal_bytes from pg_stat_get_backend_wal(pg_backend_pid())"
        )
    row = await found.fetchone()
    assert row is not None
    return int(row[0])
