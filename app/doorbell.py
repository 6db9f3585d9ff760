"""The doorbell: LISTEN and NOTIFY, outside every data transaction.

A NOTIFY holds a lock over the whole cluster until its commit is flushed, so writers do not send
one. Each process collects what it touched and rings for all of it a few milliseconds later, in one
statement of its own. A ring says only "look": rows are the truth, and a lost ring costs a safety
look (a second or two), never an event.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from uuid import UUID

import psycopg
from psycopg import sql

from app.db import CONNECTION_ERRORS, KEEPALIVE, Connection, Database
from app.log import Log

log = Log("doorbell")

#: Something of these resources may have become claimable.
WORK = "sluice_work"
#: Something happened to these batches.
EVENTS = "sluice_events"
#: Calls of these batches are to be cut.
ABORTS = "sluice_aborts"
#: A listener's ring to itself, which proves that its connection lives.
_SELF = "sluice_self"

#: A payload must stay below 8,000 bytes; more ids than this are rung as "everything".
_MOST_IDS = 200
EVERYTHING = "*"


class Ringer:
    """Collects ids and rings for them together, ``delay_s`` after the first."""

    def __init__(self, db: Database, *, delay_s: float = 0.005) -> None:
        self._db = db
        self._delay_s = delay_s
        self._waiting: dict[str, set[str]] = defaultdict(set)
        self._due = asyncio.Event()

    def ring(self, channel: str, ids: Iterable[UUID]) -> None:
        """Ring soon. Never blocks, never fails; safe to call inside a transaction's block."""
        texts = {str(i) for i in ids}
        if texts:
            self._waiting[channel] |= texts
            self._due.set()

    async def run(self) -> None:
        """Ring for what was collected, for ever. On a failure rings are dropped, as rings may be."""
        while True:
            await self._due.wait()
            await asyncio.sleep(self._delay_s)
            await self.flush()

    async def flush(self) -> None:
        """Ring now for what was collected so far."""
        self._due.clear()
        waiting, self._waiting = self._waiting, defaultdict(set)
        payloads = [
            (channel, ",".join(sorted(ids)) if len(ids) <= _MOST_IDS else EVERYTHING)
            for channel, ids in waiting.items()
        ]
        if not payloads:
            return
        try:
            async with self._db.connection() as conn:
                await conn.execute(
                    "select pg_notify(c, p) from unnest(%s::text[], %s::text[]) as n (c, p)",
                    ([c for c, _ in payloads], [p for _, p in payloads]),
                )
        except CONNECTION_ERRORS as error:
            log.debug("ring.dropped", error=type(error).__name__)


class Listener:
    """One LISTEN connection of a process, which reconnects for ever.

    ``heard(channel, ids)`` is called for every ring; ids is None when everything may have changed,
    which is also said after each (re)connection, because rings may have been missed before it.
    """

    def __init__(
        self,
        url: str,
        channels: Iterable[str],
        heard: Callable[[str, frozenset[UUID] | None], None],
        *,
        db: Database,
        check_s: float = 15.0,
    ) -> None:
        self._url = url
        self._channels = tuple(channels)
        self._heard = heard
        self._db = db
        self._check_s = check_s
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Listen for ever; returns only when cancelled."""
        failures = 0
        while True:
            try:
                conn = await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True, application_name="sluice-listen", **KEEPALIVE
                )
                async with conn:
                    failures = 0
                    await self._listen(conn)
            except (*CONNECTION_ERRORS, TimeoutError) as error:
                failures += 1
                if failures == 1:
                    log.warning("listener.lost", error=type(error).__name__)
                await self._db.revive()
                await asyncio.sleep(random.uniform(0.05, min(2.0, 0.1 * 2**failures)))  # noqa: S311 - jitter
            finally:
                self.connected.clear()

    async def _listen(self, conn: Connection) -> None:
        own = f"{_SELF}_{id(self)}_{time.monotonic_ns()}"
        for channel in (*self._channels, own):
            await conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        self.connected.set()
        for channel in self._channels:
            self._heard(channel, None)
        while True:
            alive = False
            async for notify in conn.notifies(timeout=self._check_s):
                alive = True
                if notify.channel != own:
                    self._heard(notify.channel, _ids(notify.payload))
            if not alive:
                # Nothing for a while: a ring to ourselves must come back, or the line is dead.
                await conn.execute("select pg_notify(%s, '')", (own,))
                async for notify in conn.notifies(timeout=5, stop_after=1):
                    alive = True
                    if notify.channel != own:
                        self._heard(notify.channel, _ids(notify.payload))
                if not alive:
                    raise psycopg.OperationalError("the listening connection is deaf")


def _ids(payload: str) -> frozenset[UUID] | None:
    try:
        return None if payload == EVERYTHING else frozenset(UUID(i) for i in payload.split(","))
    except ValueError:
        return None
