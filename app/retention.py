"""Retention: what is kept how long, and erasure on request.

Texts (prompts and answers) go first: they are erased in small steps and both say null afterwards, while
the facts about them stay. Facts (items, attempts, events) go with the partition of their day, when no
workspace keeps them any longer; of a workspace that keeps them shorter they are deleted in small
steps. So do deliveries; a callback's endpoint, with its secret, goes when all of its batch has gone. A
batch's own row and its counters stay, and so do the rollups (app.reports).

Nothing here waits long for a lock: a partition is detached CONCURRENTLY, which lets claims go on, and what
cannot be had now is tried again a minute later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final
from uuid import UUID

import psycopg
from psycopg import sql

from app.db import Connection, Database, NoRow, Query
from app.log import Log
from app.settings import Settings

log = Log("retention")

#: Items whose texts or rows, or deliveries, go in one transaction.
STEP: Final = 1000
_BATCHES: Final = 100
_ROLLUP_STEP: Final = 10_000
_LOCK_TIMEOUT: Final = "2s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """A batch whose texts or rows are on their way out."""

    workspace_id: UUID
    batch_day: date
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Erased:
    erased: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forgotten:
    forgotten: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partition:
    parent: str
    partition: str
    is_pending: bool


_texts_request_erasure = Query("retention", "texts_request_erasure", NoRow)
_texts_overdue = Query("retention", "texts_overdue", NoRow)
_texts_erasing = Query("retention", "texts_erasing", Going)
_texts_erase = Query("retention", "texts_erase", _Erased)
_texts_erased = Query("retention", "texts_erased", NoRow)
_facts_overdue = Query("retention", "facts_overdue", Going)
_facts_forget = Query("retention", "facts_forget", _Forgotten)
_deliveries_forget = Query("retention", "deliveries_forget", _Forgotten)
_callbacks_forget = Query("retention", "callbacks_forget", NoRow)
_partitions_old = Query("retention", "partitions_old", _Partition)
_rollup_minutes_prune = Query("retention", "rollup_minutes_prune", NoRow)
_rollup_latency_minutes_prune = Query("retention", "rollup_latency_minutes_prune", NoRow)
_rollup_hours_prune = Query("retention", "rollup_hours_prune", NoRow)
_rollup_latency_hours_prune = Query("retention", "rollup_latency_hours_prune", NoRow)
_workspace_keep = Query("retention", "workspace_keep", NoRow)


async def request_erasure(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> None:
    """Have the texts of a finished batch erased; ``erase_batch`` or maintenance does it."""
    await _texts_request_erasure.run(conn, workspace_id=workspace_id, batch_id=batch_id)


async def erase_items(
    conn: Connection, *, workspace_id: UUID, batch_day: date, batch_id: UUID, seqs: Sequence[int]
) -> int:
    """Erase the texts of certain items that have ended; how many had any."""
    row = await _texts_erase.one(
        conn,
        workspace_id=workspace_id,
        batch_day=batch_day,
        batch_id=batch_id,
        seqs=list(seqs),
        most=len(seqs),
    )
    return row.erased


async def erase_batch(db: Database, *, batch: Going, most_steps: int | None = None) -> bool:
    """Erase a batch's texts step by step; whether nothing is left of them."""
    steps = 0
    while most_steps is None or steps < most_steps:
        async with db.transaction() as conn:
            row = await _texts_erase.one(
                conn,
                workspace_id=batch.workspace_id,
                batch_day=batch.batch_day,
                batch_id=batch.batch_id,
                seqs=None,
                most=STEP,
            )
            if not row.erased:
                await _texts_erased.run(
                    conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
                )
                return True
        steps += 1
    return False


async def keep(
    conn: Connection, *, workspace_id: UUID, days: int | None, texts_days: int | None
) -> bool:
    """Set how long a workspace's rows and texts are kept (None: as the settings say); False: no such."""
    return bool(
        await _workspace_keep.run(
            conn, workspace_id=workspace_id, keep_days=days, keep_texts_days=texts_days
        )
    )


async def tidy(db: Database, settings: Settings) -> None:
    """One round of everything that retention asks for; what is left over waits for the next."""
    async with db.transaction() as conn:
        await _texts_overdue.run(conn, days=settings.retention_texts_days, most=_BATCHES)
    async with db.connection() as conn:
        erasing = await _texts_erasing.all(conn, most=_BATCHES)
    for batch in erasing:
        if await erase_batch(db, batch=batch, most_steps=_BATCHES):
            log.info("batch.texts_erased", batch=batch.batch_id)
    await _forget(db)
    await _drop_partitions(db, settings)
    async with db.transaction() as conn:
        await _callbacks_forget.run(conn, days=settings.retention_days, most=STEP)
    await _prune_rollups(db, settings)


async def _forget(db: Database) -> None:
    async with db.connection() as conn:
        overdue = await _facts_overdue.all(conn, most=_BATCHES)
    for batch in overdue:
        for query in (_facts_forget, _deliveries_forget):
            forgotten = STEP
            while forgotten == STEP:
                async with db.transaction() as conn:
                    row = await query.one(
                        conn,
                        workspace_id=batch.workspace_id,
                        batch_day=batch.batch_day,
                        batch_id=batch.batch_id,
                        most=STEP,
                    )
                forgotten = row.forgotten


async def _drop_partitions(db: Database, settings: Settings) -> None:
    if settings.retention_days is None:
        days = None
        if settings.retention_events_days is None and settings.retention_attempts_days is None:
            return
    else:
        days = settings.retention_days
    # Nothing is older than a thousand years: without a bound of its own a table keeps its days.
    forever = 365_000
    async with db.connection() as conn:
        old = await _partitions_old.all(
            conn,
            days=days or forever,
            events_days=settings.retention_events_days,
            attempts_days=settings.retention_attempts_days,
        )
        if not old:
            return
        await conn.execute("select set_config('lock_timeout', %s, false)", (_LOCK_TIMEOUT,))
        try:
            for each in old:
                await _drop(conn, each)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
            log.info("partition.in_use")
        finally:
            await conn.execute("reset lock_timeout")


async def _drop(conn: Connection, old: _Partition) -> None:
    """Detach without stopping anybody (in autocommit, as CONCURRENTLY wants it), then drop."""
    parent, partition = sql.Identifier(old.parent), sql.Identifier(old.partition)
    how = sql.SQL("finalize") if old.is_pending else sql.SQL("concurrently")
    await conn.execute(
        sql.SQL("alter table {} detach partition {} {}").format(parent, partition, how)
    )
    await conn.execute(sql.SQL("drop table {}").format(partition))
    log.info("partition.dropped", table=old.partition)


async def _prune_rollups(db: Database, settings: Settings) -> None:
    for query, days in (
        (_rollup_minutes_prune, settings.retention_minutes_days),
        (_rollup_latency_minutes_prune, settings.retention_minutes_days),
        (_rollup_hours_prune, settings.retention_hours_days),
        (_rollup_latency_hours_prune, settings.retention_hours_days),
    ):
        if days is not None:
            async with db.connection() as conn:
                await query.run(conn, days=days, most=_ROLLUP_STEP)
