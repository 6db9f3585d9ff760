"""Events: numbered without gaps, read exactly once from any number on."""

import asyncio
from itertools import cycle, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from app import events
from app.batches import Batch
from app.db import Connection, Database
from app.events import Event
from app.queue import Outcome
from tests.scene import Scene, until_blocked


async def read(scene: Scene, batch: Batch, *, after: int, most_rows: int) -> list[Event]:
    """What a follower reads who has seen ``after``."""
    async with scene.db.connection() as conn:
        return await events.after(
            conn,
            workspace_id=batch.workspace_id,
            batch_day=batch.batch_day,
            batch_id=batch.batch_id,
            number=after,
            most_rows=most_rows,
        )


async def test_reading_on_from_any_number_gives_the_rest(db: Database) -> None:
    scene = await Scene.make(db)
    batch = await scene.submit(7)
    for want in (3, 1, 2, 1):
        await scene.settle((await scene.claim(want)).items)
    whole = await scene.events(batch)
    assert [event.no for event in whole] == list(range(1, 1 + 2 + 7 + 7 + 1))
    for number in range(len(whole) + 2):
        assert await read(scene, batch, after=number, most_rows=100) == whole[number:]
    # In pages of one row, from a number in the middle of a row.
    got = await read(scene, batch, after=4, most_rows=1)
    while more := await read(scene, batch, after=got[-1].no, most_rows=1):
        got += more
    assert got == whole[4:]


async def test_a_batch_of_another_tenant_has_no_events_here(db: Database) -> None:
    scene, other = await Scene.make(db), await Scene.make(db)
    batch = await scene.submit(1)
    async with db.connection() as conn:
        assert (
            await events.after(
                conn,
                workspace_id=other.workspace_id,
                batch_day=batch.batch_day,
                batch_id=batch.batch_id,
                number=0,
            )
            == []
        )


async def append(
    conn: Connection, scene: Scene, batch: Batch, seqs: list[int] | None, kind: str = "item-running"
) -> int | None:
    cursor = await conn.execute(
        "select event_append(%s, %s, %s, %s::event_kind, %s, now())",
        (scene.workspace_id, batch.batch_day, batch.batch_id, kind, seqs),
    )
    row = await cursor.fetchone()
    assert row is not None
    return row[0]


async def test_an_append_waits_for_the_one_before_it_and_goes_on_from_there(db: Database) -> None:
    scene = await Scene.make(db)
    batch = await scene.submit(9)
    async with scene.session() as one, scene.session() as two:
        assert await append(one, scene, batch, [0, 1, 2]) == 4
        second = asyncio.create_task(append(two, scene, batch, [3, 4]))
        assert await until_blocked(scene, two, second)
        # Nothing is numbered 5 before 4 can be seen.
        assert [e.no for e in await scene.events(batch)] == [1]
        await one.commit()
        assert await asyncio.wait_for(second, 10) == 6
        await two.commit()
    assert [e.no for e in await scene.events(batch)] == [1, 2, 3, 4, 5, 6]


async def test_numbers_of_an_undone_append_are_given_again(db: Database) -> None:
    scene = await Scene.make(db)
    batch = await scene.submit(2)
    async with scene.session() as one:
        assert await append(one, scene, batch, [0, 1]) == 3
        await one.rollback()
        assert await append(one, scene, batch, [0]) == 2
        assert await append(one, scene, batch, []) is None
        await one.commit()
    assert [(e.no, e.seq) for e in await scene.events(batch)] == [(1, None), (2, 0)]


async def test_every_event_says_when_and_of_what(db: Database) -> None:
    scene = await Scene.make(db)
    batch = await scene.submit(2)
    await scene.settle((await scene.claim()).items, Outcome.rejected)
    history = await scene.events(batch)
    assert [(e.kind, e.seq) for e in history] == [
        ("batch-created", None),
        ("batch-running", None),
        ("item-running", 0),
        ("item-running", 1),
        ("item-failed", 0),
        ("item-failed", 1),
        ("batch-failed", None),
    ]
    assert all(a.at <= b.at for a, b in pairwise(history))
    assert history[-1].kind in events.LAST


ROWS = st.lists(
    st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=8
)


def test_a_reader_is_shown_each_event_once_whatever_the_rows(database: str) -> None:
    """Rows of any shape, pages of any size, and a reader who stops anywhere in one."""
    with asyncio.Runner() as runner:
        db = Database(database, size=2)
        runner.run(db.__aenter__())
        scene = runner.run(Scene.make(db))

        @given(
            rows=ROWS, most_rows=st.integers(1, 4), stops=st.lists(st.integers(1, 9), min_size=1)
        )
        @settings(max_examples=40, deadline=None, derandomize=True, database=None)
        def check(rows: list[list[int] | None], most_rows: int, stops: list[int]) -> None:
            runner.run(_read_all(scene, rows, most_rows, stops))

        try:
            check()
        finally:
            runner.run(db.__aexit__(None, None, None))


async def _read_all(
    scene: Scene, rows: list[list[int] | None], most_rows: int, stops: list[int]
) -> None:
    batch = await scene.submit(6)
    whole: list[tuple[int, int | None]] = [(1, None)]
    async with scene.db.transaction() as conn:
        for seqs in rows:
            last = await append(conn, scene, batch, seqs)
            whole += enumerate(seqs or [None], start=len(whole) + 1)
            assert last == len(whole)
    got = list[tuple[int, int | None]]()
    for stop in cycle(stops):
        page = await read(scene, batch, after=got[-1][0] if got else 0, most_rows=most_rows)
        if not page:
            break
        got += [(event.no, event.seq) for event in page[:stop]]
    assert got == whole
