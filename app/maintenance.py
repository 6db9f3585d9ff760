"""Maintenance: what one elected process does for all. It runs inside every worker process.

Every second: reclaim items of vanished workers, let the rows of cancelled batches follow, end what a
deadline has overtaken, pause what has spent what it may, and let readers of reports give way. Every ten seconds: rollups.
Every minute: partitions ahead, what retention lets go, old ledger slots, workers long gone, files that
have expired, and a look for two things that must never be: work that nobody is told of, and unstarted
items below a floor.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from uuid import UUID

import psycopg

from app import batches, files, queue, reports, results, retention
from app.db import CONNECTION_ERRORS, Database
from app.doorbell import EVENTS, WORK, Ringer
from app.log import Log
from app.settings import Settings

log = Log("maintenance")

_DUTY = "maintenance"
_DUTY_S = 10.0
_TICK_S = 1.0
_ROUNDS_PER_SLOW = 60
_ROUNDS_PER_ROLLUP = 10
_MOST_ROLLUPS = 20  # transactions of one round, so that nothing else waits for long
_DAYS_AHEAD = 3
#: Reclaimed items wait this long, so that a crash loop does not spin.
_RECLAIM_WAIT_S = 0.5


class Maintenance:
    """The duty of keeping the queue healthy; ``run`` does it whenever this process is elected.

    ``holder_id`` is the worker's id, so that a worker known to be gone leaves the duty at once.
    ``give_way`` lets backends of the database leave the processor to others; None: they are not ours.
    """

    def __init__(
        self,
        settings: Settings,
        db: Database,
        *,
        holder_id: UUID,
        give_way: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self._settings = settings
        self._db = db
        self._ringer = Ringer(db)
        self._holder_id = holder_id
        self._give_way = give_way
        # Since when the database was heard without a break, by its own clock; None: not yet.
        self._quiet_since: datetime | None = None
        self._rounds = 0

    async def run(self) -> None:
        """Keep at it; returns only when cancelled, and then leaves the duty to another."""
        try:
            while True:
                try:
                    await self._round()
                except CONNECTION_ERRORS:
                    self._quiet_since = None
                    await self._db.revive()
                await asyncio.sleep(_TICK_S * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
        finally:
            await asyncio.shield(self._resign())

    async def _resign(self) -> None:
        try:
            async with asyncio.timeout(2), self._db.connection() as conn:
                await queue.release_duty(conn, name=_DUTY, holder_id=self._holder_id)
        except (*CONNECTION_ERRORS, TimeoutError):
            log.debug("duty.left", duty=_DUTY)

    async def _round(self) -> None:
        async with self._db.connection() as conn:
            if self._quiet_since is None:
                row = await (await conn.execute("select clock_timestamp()")).fetchone()
                assert row is not None
                self._quiet_since = row[0]
            elected = await queue.take_duty(
                conn, name=_DUTY, holder_id=self._holder_id, for_s=_DUTY_S
            )
        if not elected:
            return
        await self._reclaim()
        await self._follow_cancels()
        await self._expire()
        await self._pause_exhausted()
        await self._let_readers_give_way()
        if self._rounds % _ROUNDS_PER_ROLLUP == 0:
            await self._roll_up()
        if self._rounds % _ROUNDS_PER_SLOW == 0:
            await self._slow_round()
        self._rounds += 1
        await self._ringer.flush()

    async def _reclaim(self) -> None:
        assert self._quiet_since is not None
        async with self._db.connection() as conn:
            lapsed = await queue.lapsed(
                conn,
                quiet_since=self._quiet_since,
                dead_after_s=self._settings.dead_after_s,
            )
        for (_, batch_id), group in groupby(lapsed, key=lambda i: (i.workspace_id, i.batch_id)):
            items = list(group)
            async with self._db.transaction() as conn:
                reclaimed = await queue.reclaim(
                    conn,
                    items=items,
                    max_crashes=self._settings.max_crashes,
                    wait_s=_RECLAIM_WAIT_S,
                )
            if reclaimed:
                log.warning("item.reclaimed", batch=batch_id, items=reclaimed)
                self._ringer.ring(EVENTS, {batch_id})
                self._ringer.ring(WORK, {batch_id})

    async def _follow_cancels(self) -> None:
        async with self._db.connection() as conn:
            batches = await queue.unmarked(conn)
        for batch in batches:
            await follow_cancel(
                self._db,
                self._ringer,
                workspace_id=batch.workspace_id,
                batch_id=batch.batch_id,
                batch_day=batch.batch_day,
            )

    async def _expire(self) -> None:
        async with self._db.connection() as conn:
            flows = await queue.expired(conn)
        for flow in flows:
            expired = total = 1
            while expired:
                try:
                    async with self._db.transaction() as conn:
                        expired = await queue.expire(conn, flow=flow)
                except psycopg.Error as error:
                    if error.sqlstate not in queue.CROSSED:
                        raise
                    break  # the next round looks again
                total += expired
                self._ringer.ring(EVENTS, {flow.batch_id})
            log.info("batch.expired", batch=flow.batch_id, items=total - 1)

    async def _pause_exhausted(self) -> None:
        async with self._db.connection() as conn:
            found = await batches.exhausted(conn)
        for batch in found:
            async with self._db.transaction() as conn:
                paused = await batches.pause_exhausted(conn, batch=batch)
            if paused:
                log.info("batch.exhausted", batch=batch.batch_id)
                self._ringer.ring(EVENTS, {batch.batch_id})

    async def _let_readers_give_way(self) -> None:
        if self._give_way is not None:
            async with self._db.connection() as conn:
                self._give_way(await reports.readers(conn))

    async def _roll_up(self) -> None:
        for _ in range(_MOST_ROLLUPS):
            async with self._db.transaction() as conn:
                if await reports.roll_up(conn) == 0:
                    return

    async def _slow_round(self) -> None:
        today = datetime.now(UTC).date()  # noqa: TID251 - partitions are ahead by days
        for ahead in range(_DAYS_AHEAD + 1):
            async with self._db.connection() as conn:
                await queue.ensure_partitions(conn, day=today + timedelta(days=ahead))
        async with self._db.connection() as conn:
            await queue.prune_ledger(conn, keep_hours=self._settings.ledger_keep_hours)
            await queue.forget_workers(conn)
            await results.forget(conn)
            while await files.prune(conn):
                pass
            if woken := await queue.recompute_ready(conn):
                log.error("ready.behind", resources=woken)
            for bug in await queue.below_floor(conn):
                log.error("floor.passed", batch=bug.batch_id, items=bug.items)
        await retention.tidy(self._db, self._settings)


async def follow_cancel(
    db: Database, ringer: Ringer, *, workspace_id: UUID, batch_id: UUID, batch_day: date
) -> None:
    """Mark the rows of a cancelled batch until all say so; harmless beside another doing it."""
    while True:
        try:
            async with db.transaction() as conn:
                marked = await queue.cancel_chunk(
                    conn, workspace_id=workspace_id, batch_day=batch_day, batch_id=batch_id
                )
        except psycopg.errors.DeadlockDetected:
            continue
        ringer.ring(EVENTS, {batch_id})
        if not marked:
            return
