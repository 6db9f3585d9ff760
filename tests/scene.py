"""A small world for tests: one workspace with a connection and resources, and the queue's verbs.

Plain functions over the real modules and a real database; nothing of the product is replaced.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from app import api_keys, batches, capacity, connections, events, intake, items, queue, tenants
from app.batches import Batch
from app.capacity import Amount, LimitUse
from app.db import Connection, Database
from app.events import Event
from app.ids import uuid7
from app.intake import Ingest, NewBatch, NewItem
from app.queue import Claim, Item, Observation, Outcome, Settled, Settlement
from app.resources import create as create_resource
from app.resources import get as get_resource
from app.secrets import Keyring

BODY = b'{"messages":[{"role":"user","content":"Where is my card?"}]}'
ANSWER = '{"id":"x","choices":[{"message":{"content":"In the post."}}]}'


#: Codes of outcomes that are more than their outcome's name.
_ERROR_CODES = {Outcome.throttled: "rate_limited"}


@dataclass
class Scene:
    """One tenant and its resources; ``workers`` are ids that may claim."""

    db: Database
    keyring: Keyring
    workspace_id: UUID
    environment_id: UUID
    connection_id: UUID
    resource_ids: list[UUID]
    worker_id: UUID = field(default_factory=uuid7)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        rpm: int | None = None,
        tpm: int | None = None,
        connection_rpm: int | None = None,
        resources: int = 1,
        models: Sequence[str] = (),
        base_url: str = "http://127.0.0.1:9/v1",
        pool: int = 6,
    ) -> AsyncGenerator["Scene"]:
        """A fresh tenant in a database; limits per resource (and on the connection).

        ``models``: one resource of each, in place of ``resources`` of the same model.
        """
        async with Database(url, size=pool) as db:
            yield await cls.make(
                db,
                rpm=rpm,
                tpm=tpm,
                connection_rpm=connection_rpm,
                resources=resources,
                models=models,
                base_url=base_url,
            )

    @classmethod
    async def make(
        cls,
        db: Database,
        *,
        rpm: int | None = None,
        tpm: int | None = None,
        connection_rpm: int | None = None,
        resources: int = 1,
        models: Sequence[str] = (),
        base_url: str = "http://127.0.0.1:9/v1",
    ) -> "Scene":
        keyring = Keyring(Keyring.generate())
        async with db.transaction() as conn:
            environment = await tenants.create_workspace(conn, name="w", environment="e")
            connection_id = await connections.create(
                conn,
                keyring=keyring,
                workspace_id=environment.workspace_id,
                environment_id=environment.environment_id,
                name="c",
                provider="openai-compatible",
                base_url=base_url,
                secret="sk-secret",
                timeout_ms=30_000,
                amounts=_amounts(connection_rpm, None),
            )
            resource_ids = [
                await create_resource(
                    conn,
                    workspace_id=environment.workspace_id,
                    environment_id=environment.environment_id,
                    connection_id=connection_id,
                    name=f"r{number}",
                    model=model,
                    amounts=_amounts(rpm, tpm),
                )
                for number, model in enumerate(models or ["gpt-4o-mini"] * resources)
            ]
            scene = cls(
                db=db,
                keyring=keyring,
                workspace_id=environment.workspace_id,
                environment_id=environment.environment_id,
                connection_id=connection_id,
                resource_ids=resource_ids,
            )
            await scene.register(conn, scene.worker_id)
        return scene

    @property
    def resource_id(self) -> UUID:
        return self.resource_ids[0]

    async def register(self, conn: Connection, worker_id: UUID) -> None:
        await queue.register_worker(
            conn, worker_id=worker_id, host="elsewhere", machine="elsewhere", pid=1, version="0"
        )

    async def submit(
        self,
        items: int | Sequence[bytes],
        *,
        resource: int = 0,
        priority: int = 0,
        max_attempts: int = 5,
        resources: Sequence[int] | None = None,
        amounts: Sequence[Amount] = (),
        api_key_id: UUID | None = None,
        metadata: Mapping[str, object] | None = None,
        source_ip: str | None = None,
        weight: float = 1,
        expires_in: float | None = None,
    ) -> Batch:
        """A batch of that many equal items (or of these bodies), spread over ``resources``."""
        bodies = [BODY] * items if isinstance(items, int) else list(items)
        used = [self.resource_ids[n] for n in (resources or [resource])]
        batch = NewBatch(
            workspace_id=self.workspace_id,
            environment_id=self.environment_id,
            type="async",
            priority=priority,
            max_attempts=max_attempts,
            amounts=amounts,
            created_by_api_key_id=api_key_id,
            metadata=metadata or {},
            source_ip=source_ip,
            weight=weight,
            expires_at=None if expires_in is None else await self.now(expires_in),
        )
        async with self.db.connection() as conn:
            await intake.prepare_day(conn, batch)
        async with self.db.transaction() as conn:
            known = {
                resource_id: found
                for resource_id in set(used)
                if (
                    found := await get_resource(
                        conn,
                        workspace_id=self.workspace_id,
                        environment_id=self.environment_id,
                        resource_id=resource_id,
                    )
                )
            }
            ingest = Ingest(conn, batch, known)
            await ingest.add(
                [
                    NewItem(resource_id=used[n % len(used)], body=body)
                    for n, body in enumerate(bodies)
                ]
            )
            await ingest.finish()
        return await self.batch(batch.batch_id)

    async def now(self, plus: float = 0) -> datetime:
        """The database's clock, or a time so many seconds from it."""
        return await self.value("select clock_timestamp() + make_interval(secs => %s)", plus)

    async def api_key(self, *amounts: Amount) -> UUID:
        """A key with limits; ``submit`` takes its id."""
        async with self.db.transaction() as conn:
            api_key_id, _ = await api_keys.create(
                conn,
                workspace_id=self.workspace_id,
                environment_id=self.environment_id,
                name="k",
                amounts=amounts,
            )
        return api_key_id

    async def add_connection(self, *, model: str = "gpt-4o-mini") -> int:
        """One more account at a provider with one resource; the resource's number."""
        number = len(self.resource_ids)
        async with self.db.transaction() as conn:
            connection_id = await connections.create(
                conn,
                keyring=self.keyring,
                workspace_id=self.workspace_id,
                environment_id=self.environment_id,
                name=f"c{number}",
                provider="openai-compatible",
                base_url="http://127.0.0.1:9/v1",
                secret=None,
                timeout_ms=30_000,
            )
        return await self.add_resource(connection_id=connection_id, model=model)

    async def add_resource(self, *, connection_id: UUID | None = None, model: str) -> int:
        """One more resource; its number."""
        number = len(self.resource_ids)
        async with self.db.transaction() as conn:
            self.resource_ids.append(
                await create_resource(
                    conn,
                    workspace_id=self.workspace_id,
                    environment_id=self.environment_id,
                    connection_id=connection_id or self.connection_id,
                    name=f"r{number}",
                    model=model,
                )
            )
        return number

    async def model_scope_id(self, resource: int = 0) -> UUID:
        """What a resource shares with all others of its model on the connection."""
        return await self.value(
            "select model_scope_id from resources where resource_id = %s",
            self.resource_ids[resource],
        )

    async def batch(self, batch_id: UUID) -> Batch:
        async with self.db.connection() as conn:
            found = await batches.get(
                conn,
                workspace_id=self.workspace_id,
                environment_id=self.environment_id,
                batch_id=batch_id,
            )
        assert found is not None
        return found

    async def claim(
        self,
        want: int = 1000,
        *,
        conn: Connection | None = None,
        resource: int = 0,
        worker_id: UUID | None = None,
        alone: bool = True,
        guard_s: float = 1.0,
        burst_s: float = 60,
        slow_start: int = 0,
    ) -> Claim:
        """Claim, in a transaction of its own unless ``conn`` is in one."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.claim(
                    want,
                    conn=own,
                    resource=resource,
                    worker_id=worker_id,
                    alone=alone,
                    guard_s=guard_s,
                    burst_s=burst_s,
                    slow_start=slow_start,
                )
        return await queue.claim(
            conn,
            workspace_id=self.workspace_id,
            resource_id=self.resource_ids[resource],
            worker_id=worker_id or self.worker_id,
            want=want,
            alone=alone,
            guard_s=guard_s,
            grace_s=60,
            burst_s=burst_s,
            slow_start=slow_start,
        )

    async def settle(
        self,
        items: Sequence[Item],
        outcome: Outcome = Outcome.answered,
        *,
        conn: Connection | None = None,
        used: tuple[int, int] | None = (10, 20),
        outputs: Sequence[int] | None = None,
        wait_s: float | None = None,
        refund: bool = False,
        worker_id: UUID | None = None,
        body: str = ANSWER,
        error_code: str | None = None,
        observed: Sequence[Observation] = (),
        rest_s: float = 1.0,
        rest_most_s: float = 60.0,
    ) -> list[Settled]:
        """Record the same outcome for these items; ``used``: input and output tokens.

        ``outputs``: output tokens of each item, in place of the same ones for all.
        """
        if conn is None:
            async with self.db.transaction() as own:
                return await self.settle(
                    items,
                    outcome,
                    conn=own,
                    used=used,
                    outputs=outputs,
                    wait_s=wait_s,
                    refund=refund,
                    worker_id=worker_id,
                    body=body,
                    error_code=error_code,
                    observed=observed,
                    rest_s=rest_s,
                    rest_most_s=rest_most_s,
                )
        answered = outcome == Outcome.answered
        code = None if answered else error_code or _ERROR_CODES.get(outcome, outcome.value)
        return await queue.settle(
            conn,
            workspace_id=self.workspace_id,
            worker_id=worker_id or self.worker_id,
            observed=observed,
            rest_s=rest_s,
            rest_most_s=rest_most_s,
            settlements=[
                Settlement(
                    batch_day=item.batch_day,
                    batch_id=item.batch_id,
                    resource_id=item.resource_id,
                    connection_id=self.connection_id,
                    seq=item.seq,
                    attempt=item.attempt,
                    outcome=outcome,
                    claimed_at=item.claimed_at,
                    limit_ids=item.limit_ids,
                    reserved_input_tokens=item.input_tokens,
                    reserved_output_tokens=item.output_tokens,
                    expected_output_tokens=item.expected_output_tokens,
                    refund=refund or outcome in {Outcome.unsent, Outcome.impossible},
                    wait_s=wait_s,
                    status_code=200 if answered else None,
                    error_code=code,
                    error_message=None if answered else "as the test wishes",
                    input_tokens=used[0] if answered and used else None,
                    output_tokens=output if answered and used else None,
                )
                for item, output in zip(
                    items, outputs or [used[1] if used else None] * len(items), strict=True
                )
            ],
            bodies=[body if answered else None for _ in items],
        )

    async def reclaim(
        self,
        items: Sequence[Item],
        *,
        conn: Connection | None = None,
        alone: bool = False,
        max_crashes: int = 3,
    ) -> int:
        """Bring items of one batch back as if their worker had vanished."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.reclaim(items, conn=own, alone=alone, max_crashes=max_crashes)
        return await queue.reclaim(
            conn,
            items=[
                queue.Lapsed(
                    workspace_id=item.workspace_id,
                    batch_day=item.batch_day,
                    batch_id=item.batch_id,
                    seq=item.seq,
                    attempt=item.attempt,
                    alone=alone,
                )
                for item in items
            ],
            max_crashes=max_crashes,
            wait_s=0,
        )

    async def cancel(
        self, batch: Batch, *, conn: Connection | None = None, abort: bool = False
    ) -> str | None:
        """Close a batch; its rows follow with ``mark``."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.cancel(batch, conn=own, abort=abort)
        return await queue.cancel(
            conn, workspace_id=self.workspace_id, batch_id=batch.batch_id, abort=abort
        )

    async def mark(self, batch: Batch, *, conn: Connection | None = None, most: int = 2000) -> int:
        """Let some rows of a cancelled batch follow; how many."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.mark(batch, conn=own, most=most)
        return await queue.cancel_chunk(
            conn,
            workspace_id=self.workspace_id,
            batch_day=batch.batch_day,
            batch_id=batch.batch_id,
            most=most,
        )

    async def redrive(
        self,
        batch: Batch,
        *,
        conn: Connection | None = None,
        most: int = 5000,
        **which: Any,  # noqa: ANN401 - batches.redrive's
    ) -> int:
        """Put failed items back, or those that ``which`` says; how many."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.redrive(batch, conn=own, most=most, **which)
        return await batches.redrive(
            conn, workspace_id=self.workspace_id, batch_id=batch.batch_id, most=most, **which
        )

    async def expire(
        self,
        batch: Batch,
        *,
        resource: int = 0,
        conn: Connection | None = None,
        most: int = 2000,
    ) -> int:
        """End items of a batch whose deadline has passed; how many."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.expire(batch, resource=resource, conn=own, most=most)
        return await queue.expire(
            conn,
            flow=queue.Expired(
                workspace_id=self.workspace_id,
                batch_day=batch.batch_day,
                batch_id=batch.batch_id,
                resource_id=self.resource_ids[resource],
            ),
            most=most,
        )

    async def set_deadline(
        self, batch: Batch, seconds: float | None, *, conn: Connection | None = None
    ) -> None:
        """Give a batch a new deadline so many seconds from now (past: negative), or none."""
        if conn is None:
            async with self.db.transaction() as own:
                await self.set_deadline(batch, seconds, conn=own)
            return
        expires_at = None if seconds is None else await self.now(seconds)
        for change in (
            b"update flows set expires_at = %s where workspace_id = %s and batch_id = %s",
            b"update batches set expires_at = %s where workspace_id = %s and batch_id = %s",
        ):
            await conn.execute(change, (expires_at, self.workspace_id, batch.batch_id))
        await batches.resume(conn, workspace_id=self.workspace_id, batch_id=batch.batch_id)

    async def set_limits(
        self, scope_id: UUID, *amounts: Amount, conn: Connection | None = None
    ) -> list[UUID]:
        """What the product does to change limits, and nothing else; whom it would ring for."""
        if conn is None:
            async with self.db.transaction() as own:
                return await self.set_limits(scope_id, *amounts, conn=own)
        return await capacity.set_limits(
            conn, workspace_id=self.workspace_id, scope_id=scope_id, amounts=amounts
        )

    async def scope_ids(self, batch: Batch, *, resource: int = 0) -> list[UUID]:
        """Every scope whose limits an item of a batch must fit on a resource."""
        return await self.value(
            "select array[r.connection_id, r.model_scope_id, r.resource_id] || f.scope_ids"
            " from flows f join resources r using (workspace_id, resource_id)"
            " where f.workspace_id = %s and f.batch_id = %s and f.resource_id = %s",
            self.workspace_id,
            batch.batch_id,
            self.resource_ids[resource],
        )

    async def used(self, *scope_ids: UUID, guard_s: float = 1) -> list[LimitUse]:
        """The limits of scopes and what of each counts now."""
        async with self.db.connection() as conn:
            return await capacity.used(
                conn, workspace_id=self.workspace_id, scope_ids=scope_ids, guard_s=guard_s
            )

    async def limit(
        self,
        *,
        requests: int | None = None,
        tokens: int | None = None,
        resource: int = 0,
        scope_id: UUID | None = None,
    ) -> None:
        """Replace the limits per minute of a resource (or of another scope)."""
        async with self.db.transaction() as conn:
            await capacity.set_limits(
                conn,
                workspace_id=self.workspace_id,
                scope_id=scope_id or self.resource_ids[resource],
                amounts=_amounts(requests, tokens),
            )
            # Whoever changes limits has a look taken (batches.resume).
            await conn.execute(
                "update ready set next_at = clock_timestamp() where workspace_id = %s",
                (self.workspace_id,),
            )

    async def calm(self) -> None:
        """Forget what refusals have taught."""
        await self.do(
            "update scope_states set blocked_until = '-infinity', refusals = 0, ceiling = null,"
            " concurrency = null, burst_share = 1 where workspace_id = %s",
            self.workspace_id,
        )

    async def size(self, batch: Batch, sizes: Sequence[tuple[int, int]]) -> None:
        """Give the first items these estimates of input and output tokens."""
        await self.do(
            "update items i set input_tokens = s.i, max_output_tokens = s.o"
            " from unnest(%s::int[], %s::int[]) with ordinality as s (i, o, n)"
            " where i.batch_id = %s and i.seq = s.n - 1",
            [i for i, _ in sizes],
            [o for _, o in sizes],
            batch.batch_id,
        )

    async def age(self, seconds: int) -> None:
        """Make all that was claimed so many seconds older, as if that time had passed."""
        for change in (
            # In two steps: in one, a slot may meet another that has not moved yet.
            (
                "update ledger set slot_at = slot_at - interval '3650 days' - %s * interval '1 second'"
                " where workspace_id = %s"
            ),
            "update items set claimed_at = claimed_at - %s * interval '1 second' where workspace_id = %s",
            "update attempts set claimed_at = claimed_at - %s * interval '1 second' where workspace_id = %s",
            "update flows set waits_until = waits_until - %s * interval '1 second' where workspace_id = %s",
        ):
            await self.do(change, seconds, self.workspace_id)
        await self.do(
            "update ledger set slot_at = slot_at + interval '3650 days' where workspace_id = %s",
            self.workspace_id,
        )
        # Coarse slots do not move as a whole: they are made anew from what was claimed.
        async with self.db.transaction() as conn:
            await conn.execute(FORGET_COARSE_SLOTS.encode(), (self.workspace_id,))
            await conn.execute(REMAKE_COARSE_SLOTS.encode(), (self.workspace_id,))

    async def pass_time(self, seconds: int) -> None:
        """The same, and all that is still to come is so much nearer: deadlines, rests, next tries."""
        await self.age(seconds)
        for change in (
            "update flows set created_at = created_at - w, expires_at = expires_at - w",
            "update batches set expires_at = expires_at - w",
            "update items set visible_at = visible_at - w",
            "update ready set next_at = next_at - w",
            (
                "update scope_states set blocked_until = blocked_until - w, begun_at = begun_at - w,"
                " throttled_at = throttled_at - w, probed_at = probed_at - w, raise_at = raise_at - w,"
                " slowed_at = slowed_at - w"
            ),
        ):
            await self.do(
                f"{change} from (select make_interval(secs => %s)) as passed (w) where workspace_id = %s",
                seconds,
                self.workspace_id,
            )

    async def items(self, batch: Batch) -> list[items.Item]:
        """All items of a batch, as the API reads them."""
        async with self.db.connection() as conn:
            numbers = await items.seqs(conn, batch=batch, most=100_000)
            return await items.numbered(conn, batch=batch, seqs=numbers)

    async def events(self, batch: Batch) -> list[Event]:
        """The whole history of a batch."""
        async with self.db.connection() as conn:
            return await events.after(
                conn,
                workspace_id=batch.workspace_id,
                batch_day=batch.batch_day,
                batch_id=batch.batch_id,
                number=0,
                most_rows=100_000,
            )

    async def due_in(self, resource: int = 0) -> float:
        """Seconds until a look at a resource is due, by the ready table; infinity if never."""
        return float(
            await self.value(
                # In two steps: Postgres 16 cannot subtract from infinity.
                "select extract(epoch from next_at) - extract(epoch from clock_timestamp()) from ready"
                " where resource_id = %s",
                self.resource_ids[resource],
            )
        )

    async def do(self, statement: str, *params: object) -> None:
        """Change whatever a test wants to be otherwise."""
        async with self.db.connection() as conn:
            await conn.execute(statement.encode(), params)

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Connection]:
        """A connection whose transaction the test commits itself; else it is rolled back."""
        conn = await psycopg.AsyncConnection.connect(self.db.url)
        try:
            yield conn
        finally:
            await conn.close()

    async def rows(self, query: str, *params: object) -> list[tuple[Any, ...]]:
        """Whatever a test wants to see."""
        async with self.db.connection() as conn:
            return await (await conn.execute(query.encode(), params)).fetchall()

    async def value(self, query: str, *params: object) -> Any:  # noqa: ANN401 - whatever it is
        return (await self.rows(query, *params))[0][0]

    async def check_books(self) -> None:
        """Counters equal a recount of the items; the ledger equals the recount of design §9."""
        assert await self.rows(RECOUNT_FLOWS, self.workspace_id) == []
        assert await self.rows(RECOUNT_LEDGER, self.workspace_id) == []
        assert await self.rows(RECOUNT_EVENTS, self.workspace_id, self.workspace_id) == []
        assert await self.rows(RECOUNT_COSTS, self.workspace_id) == []
        assert await self.rows(RECOUNT_ATTEMPTS, self.workspace_id) == []
        assert await self.rows(LOST_WAKE_UPS, self.workspace_id) == []


#: Flows whose counters differ from what their items say.
RECOUNT_FLOWS = """
    select f.batch_id, f.pending, f.running, f.completed, f.failed, f.cancelled, r.*
    from flows f
    cross join lateral (
        select count(*) filter (where i.status = 'pending') as pending,
            count(*) filter (where i.status = 'pending' and i.attempt = 0) as unstarted,
            count(*) filter (where i.status = 'running') as running,
            count(*) filter (where i.status = 'completed') as completed,
            count(*) filter (where i.status = 'failed') as failed,
            count(*) filter (where i.status = 'cancelled') as cancelled,
            count(*) as total
        from items i
        where i.workspace_id = f.workspace_id and i.batch_id = f.batch_id
            and i.resource_id = f.resource_id
    ) r
    where f.workspace_id = %s and ((f.total, f.running, f.completed, f.failed) <> (r.total, r.running, r.completed, r.failed)
        or case when f.is_cancelled
            then (f.cancelled, f.unmarked) <> (r.cancelled + r.pending, r.pending)
            else (f.pending, f.unstarted, f.cancelled) <> (r.pending, r.unstarted, r.cancelled) end)
"""

#: What each limit must have in its slots: the reservation where an attempt is in flight, else its charge.
_RECOUNT = """
    with tenant as (select %s::uuid as workspace_id),
    charged as (
        select workspace_id, limit_id, claimed_at, charged_requests as requests,
            charged_input_tokens as input_tokens, charged_output_tokens as output_tokens,
            case when outcome = 'lost' then expected_output_tokens else charged_output_tokens end
                as expected_output_tokens,
            (outcome = 'throttled')::int as refused,
            case when reserved_cost_nano is null then 0 else coalesce(cost_nano, reserved_cost_nano) end as cost_nano
        from attempts join tenant using (workspace_id) cross join unnest(reserved_limits) as limit_id
        union all
        select workspace_id, limit_id, claimed_at, 1, reserved_input_tokens, reserved_output_tokens,
            expected_output_tokens, 0, coalesce(reserved_cost_nano, 0)
        from items join tenant using (workspace_id) cross join unnest(reserved_limits) as limit_id
        where status = 'running'
    ),
    recount as (
        select c.workspace_id, c.limit_id, slot_of(l.period, l.sliding, c.claimed_at) as slot_at,
            array[sum(c.requests), sum(c.input_tokens), sum(c.output_tokens),
                sum(c.expected_output_tokens), sum(c.refused), sum(c.cost_nano)]::bigint[] as amounts
        from charged c join limits l using (workspace_id, limit_id)
        group by 1, 2, 3
    )
"""

#: Ledger slots that differ from that.
RECOUNT_LEDGER = (
    _RECOUNT  # noqa: S608 - constants
    + """
    select g.*, r.*
    from (
        select workspace_id, limit_id, slot_at,
            array[g.requests, g.input_tokens, g.output_tokens, g.expected_output_tokens, g.refused, g.cost_nano]
                as amounts
        from ledger g join tenant using (workspace_id)
        join limits using (workspace_id, limit_id)
    ) g
    full join recount r using (workspace_id, limit_id, slot_at)
    where coalesce(g.amounts, '{0,0,0,0,0,0}') <> coalesce(r.amounts, '{0,0,0,0,0,0}')
"""
)

#: Slots longer than half a second, and the same as they would be had all been claimed when it says.
FORGET_COARSE_SLOTS = """
    delete from ledger g using limits l
    where g.workspace_id = %s and l.workspace_id = g.workspace_id and l.limit_id = g.limit_id
        and l.source = 'given' and not (l.sliding and l.period = 'minute')
"""
REMAKE_COARSE_SLOTS = (
    _RECOUNT  # noqa: S608 - constants
    + """
    insert into ledger (workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens,
        expected_output_tokens, refused)
    select workspace_id, limit_id, slot_at, amounts[1], amounts[2], amounts[3], amounts[4], amounts[5]
    from recount join limits l using (workspace_id, limit_id)
    where l.source = 'given' and not (l.sliding and l.period = 'minute')
"""
)

#: Batches whose events have gaps or overlaps, and terminal items without exactly one final event.
RECOUNT_EVENTS = """
    select batch_id, first_no, 'gap' from (
        select batch_id, first_no, lag(last_no, 1, 0::bigint) over (partition by batch_id order by last_no)
            as before
        from events where workspace_id = %s
    ) e
    where first_no <> before + 1
    union all
    select i.batch_id, i.seq, 'final events' from items i
    where i.workspace_id = %s and i.status in ('completed', 'cancelled') and 1 <> (
        select count(*) from events e
        where e.workspace_id = i.workspace_id and e.batch_id = i.batch_id and i.seq = any (e.seqs)
            and e.kind::text = 'item-' || i.status::text
    )
"""

#: Flows whose cost is not the sum of their attempts' costs.
RECOUNT_COSTS = """
    select f.batch_id, f.cost_nano, a.cost_nano
    from flows f
    cross join lateral (
        select coalesce(sum(a.cost_nano), 0) as cost_nano
        from attempts a
        where a.workspace_id = f.workspace_id and a.batch_id = f.batch_id and a.resource_id = f.resource_id
    ) a
    where f.workspace_id = %s and f.cost_nano <> a.cost_nano
"""

#: Items whose attempts are numbered otherwise than 1, 2, …, the present one (unsent ones have no row).
RECOUNT_ATTEMPTS = """
    select i.batch_id, i.seq, i.attempt, a.attempt
    from items i
    join attempts a on a.workspace_id = i.workspace_id and a.batch_day = i.batch_day
        and a.batch_id = i.batch_id and a.seq = i.seq
    where i.workspace_id = %s
        and (a.attempt > i.attempt or a.attempt = i.attempt and i.status = 'running')
"""

#: Resources without limits whose next look comes later than their work.
LOST_WAKE_UPS = """
    select r.resource_id, r.next_at
    from ready r
    join resources s using (workspace_id, resource_id)
    join scope_states b on b.workspace_id = s.workspace_id and b.scope_id = s.model_scope_id
    where r.workspace_id = %s and b.blocked_until < clock_timestamp() and b.ceiling is null
        and not exists (
            select from limits l
            where l.workspace_id = r.workspace_id
                and (
                    l.scope_id in (r.resource_id, s.connection_id)
                    or l.scope_id = s.model_scope_id
                    and coalesce(l.requests, l.tokens, l.input_tokens, l.output_tokens) is not null
                )
        )
        and b.refusals = 0
        and not exists (
            select from scope_states c
            where c.workspace_id = r.workspace_id and c.scope_id = s.connection_id
                and c.blocked_until >= clock_timestamp()
        )
        and r.reason is distinct from 'concurrency'
        and r.next_at > greatest(
            (select due_at from work_due(r.workspace_id, r.resource_id, now())), clock_timestamp())
        and exists (select from work_due(r.workspace_id, r.resource_id, now()))
"""


async def until_blocked(scene: Scene, conn: Connection, work: "asyncio.Task[Any]") -> bool:
    """Whether ``conn`` waits for another session's lock; False when ``work`` ended without."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if await scene.value("select cardinality(pg_blocking_pids(%s))", conn.info.backend_pid):
            return True
        if work.done():
            return False
        await asyncio.sleep(0.002)
    raise TimeoutError("neither blocked nor done")


def _amounts(rpm: int | None, tpm: int | None) -> list[Amount]:
    return (
        [] if rpm is None and tpm is None else [Amount(period="minute", requests=rpm, tokens=tpm)]
    )


def since(moment: datetime, later: datetime) -> float:
    """Seconds between two database times."""
    return (later - moment).total_seconds()
