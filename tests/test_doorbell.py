"""The doorbell: rings are collected, and a listener that was cut off says so."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import psycopg
import pytest

from app.db import Database
from app.doorbell import EVENTS, EVERYTHING, WORK, Listener, Ringer
from app.ids import uuid7

Ring = tuple[str, frozenset[UUID] | None]


@pytest.fixture
async def raw(database: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A plain connection that listens on both channels."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as conn:
        await conn.execute("listen sluice_work")
        await conn.execute("listen sluice_events")
        yield conn


async def heard(conn: psycopg.AsyncConnection[Any]) -> list[tuple[str, str]]:
    """What came so far; a ring to ourselves marks the end, since rings keep their order."""
    await conn.execute("listen enough")
    await conn.execute("notify enough")
    rings = list[tuple[str, str]]()
    async for notify in conn.notifies(timeout=10):
        if notify.channel == "enough":
            break
        rings.append((notify.channel, notify.payload))
    return rings


async def test_rings_are_collected_into_one_per_channel(
    db: Database, raw: psycopg.AsyncConnection[Any]
) -> None:
    ringer = Ringer(db)
    ids = sorted(uuid7() for _ in range(3))
    for one in (*ids, ids[0]):
        ringer.ring(EVENTS, [one])
    ringer.ring(WORK, ids[:1])
    ringer.ring(WORK, [])
    await ringer.flush()
    await ringer.flush()
    assert sorted(await heard(raw)) == [
        ("sluice_events", ",".join(str(i) for i in ids)),
        ("sluice_work", str(ids[0])),
    ]


async def test_many_ids_are_rung_as_everything(
    db: Database, raw: psycopg.AsyncConnection[Any]
) -> None:
    ringer = Ringer(db)
    ringer.ring(EVENTS, {uuid7() for _ in range(200)})
    await ringer.flush()
    ringer.ring(EVENTS, {uuid7() for _ in range(201)})
    await ringer.flush()
    few, many = await heard(raw)
    assert len(few[1].split(",")) == 200
    assert many == ("sluice_events", EVERYTHING)


async def test_rings_of_one_statement_reach_all_channels_together(
    db: Database, raw: psycopg.AsyncConnection[Any]
) -> None:
    """One transaction: one fight for the lock that NOTIFY takes over the whole cluster."""
    executed = list[object]()

    @asynccontextmanager
    async def connection() -> AsyncGenerator[Any]:
        async with db.connection() as conn:
            yield _Counting(conn, executed)

    counted: Any = type("Counted", (), {"connection": staticmethod(connection)})()
    ringer = Ringer(counted)
    ringer.ring(WORK, [uuid7()])
    ringer.ring(EVENTS, [uuid7()])
    await ringer.flush()
    assert len(executed) == 1
    assert len(await heard(raw)) == 2


class _Counting:
    def __init__(self, conn: Any, executed: list[object]) -> None:  # noqa: ANN401 - a connection
        self._conn = conn
        self._executed = executed

    async def execute(self, *args: Any) -> object:  # noqa: ANN401 - passed on
        self._executed.append(args)
        return await self._conn.execute(*args)


async def test_run_rings_by_itself_and_after_a_failure_still(
    db: Database, raw: psycopg.AsyncConnection[Any]
) -> None:
    ringer = Ringer(db, delay_s=0)
    running = asyncio.create_task(ringer.run())
    try:
        for _ in range(2):
            one = uuid7()
            ringer.ring(WORK, [one])
            async for notify in raw.notifies(timeout=10, stop_after=1):
                assert notify.payload == str(one)
                break
            else:
                pytest.fail("no ring came")
    finally:
        await _end(running)


async def test_a_lost_ring_is_no_failure(database: str) -> None:
    db = Database(database, size=1)
    async with db:
        pass
    ringer = Ringer(db)
    ringer.ring(WORK, [uuid7()])
    with suppress(
        psycopg.Error
    ):  # the pool is closed: what flush may not do is raise anything else
        await ringer.flush()


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


class Ears:
    """A listener's callback that keeps what it hears."""

    def __init__(self) -> None:
        self.rings: asyncio.Queue[Ring] = asyncio.Queue()

    def __call__(self, channel: str, ids: frozenset[UUID] | None) -> None:
        self.rings.put_nowait((channel, ids))

    async def next(self) -> Ring:
        return await asyncio.wait_for(self.rings.get(), 10)


@asynccontextmanager
async def listening(
    database: str, db: Database, ears: Ears, channels: tuple[str, ...] = (WORK,)
) -> AsyncGenerator[Listener]:
    listener = Listener(database, channels, ears, db=db, check_s=0.05)
    running = asyncio.create_task(listener.run())
    try:
        async with asyncio.timeout(10):
            await listener.connected.wait()
        yield listener
    finally:
        await _end(running)


async def test_a_listener_says_everything_first_and_then_what_was_rung(
    database: str, db: Database
) -> None:
    ears, ringer, ids = Ears(), Ringer(db), {uuid7(), uuid7()}
    async with listening(database, db, ears, (WORK, EVENTS)):
        assert {await ears.next(), await ears.next()} == {(WORK, None), (EVENTS, None)}
        ringer.ring(EVENTS, ids)
        await ringer.flush()
        assert await ears.next() == (EVENTS, frozenset(ids))
        ringer.ring(WORK, {uuid7() for _ in range(300)})
        await ringer.flush()
        assert await ears.next() == (WORK, None)


@pytest.mark.parametrize("payload", ["", "not-an-id", "*"])
async def test_a_ring_that_is_not_understood_means_everything(
    database: str, db: Database, payload: str
) -> None:
    ears = Ears()
    async with listening(database, db, ears):
        await ears.next()
        async with db.connection() as conn:
            await conn.execute("select pg_notify('sluice_work', %s)", (payload,))
        assert await ears.next() == (WORK, None)


async def test_a_listener_that_was_cut_off_reconnects_and_says_everything(
    database: str, db: Database
) -> None:
    """Rings may have been missed meanwhile: whoever listens must look at all."""
    ears, ringer = Ears(), Ringer(db)
    async with listening(database, db, ears):
        assert await ears.next() == (WORK, None)
        async with db.connection() as conn:
            cursor = await conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = 'sluice-listen' and datname = current_database()"
            )
            assert await cursor.fetchall() == [(True,)]
        assert await ears.next() == (WORK, None)
        one = uuid7()
        ringer.ring(WORK, [one])
        await ringer.flush()
        assert await ears.next() == (WORK, frozenset([one]))


async def test_a_silent_line_is_kept_by_rings_to_itself_that_nobody_hears(
    database: str, db: Database
) -> None:
    ears = Ears()
    async with listening(database, db, ears):
        assert await ears.next() == (WORK, None)
        async with asyncio.timeout(10), db.connection() as conn:
            while True:
                row = await (
                    await conn.execute(
                        "select query from pg_stat_activity"
                        " where application_name = 'sluice-listen' and datname = current_database()"
                    )
                ).fetchone()
                if row and "pg_notify" in row[0]:
                    break
                await asyncio.sleep(0.005)
        one = uuid7()
        ringer = Ringer(db)
        ringer.ring(WORK, [one])
        await ringer.flush()
        # A ring that comes while the line is being checked is heard all the same.
        assert await ears.next() == (WORK, frozenset([one]))
