"""What is kept how long: texts go before facts, whole days are dropped, rollups stay, claims go on."""

import asyncio
from datetime import date, timedelta

import pytest

from app import retention
from app.batches import Batch
from app.queue import Outcome
from app.retention import Going
from app.settings import Settings
from tests.scene import Scene
from tests.test_prices import price, put
from tests.test_reports import roll_up

PARENTS = (
    *("items", "item_requests", "item_results", "attempts", "events"),
    *("deliveries", "delivery_attempts"),
)


def going(batch: Batch) -> Going:
    return Going(
        workspace_id=batch.workspace_id, batch_day=batch.batch_day, batch_id=batch.batch_id
    )


async def finished(scene: Scene, items: int = 2) -> Batch:
    batch = await scene.submit(items)
    await scene.settle((await scene.claim()).items)
    return await scene.batch(batch.batch_id)


#: What pending deliveries become when their receiver is away for good.
ENDED = (
    "update deliveries set status = 'dead', reason = 'it failed', ended_at = clock()"
    " where status = 'pending'"
)


async def told(scene: Scene) -> Batch:
    """A finished batch that told a callback of its items and its end, and a webhook of its end."""
    await scene.do(
        "insert into endpoints (workspace_id, endpoint_id, environment_id, url, event_types, secret_key_id,"
        " secret, secret_hint) values (%s, %s, %s, 'https://example.com/', '{batch.completed}', 'k', '', '')"
        " on conflict do nothing",
        *(scene.workspace_id, scene.environment_id, scene.environment_id),
    )
    batch = await scene.submit(2)
    await scene.do(
        "insert into endpoints (workspace_id, endpoint_id, environment_id, batch_id, batch_day, url, event_types,"
        " secret_key_id, secret, secret_hint) select workspace_id, batch_id, environment_id, batch_id, batch_day,"
        " 'https://example.com/', '{item_update,batch_update}', 'k', '', '' from batches where batch_id = %s",
        batch.batch_id,
    )
    await scene.do("update batches set callback_options = '{}' where batch_id = %s", batch.batch_id)
    await scene.settle((await scene.claim()).items)
    await scene.do(ENDED)
    await scene.do(
        "insert into delivery_attempts select workspace_id, batch_day, batch_id, event_no, endpoint_id, 1, clock(), 1"
        " from deliveries on conflict do nothing"
    )
    return await scene.batch(batch.batch_id)


async def aged(scene: Scene, batch: Batch, days: int) -> date:
    """The same batch, as if it had been made so many days ago; its day."""
    day = batch.batch_day - timedelta(days=days)
    await scene.do("select partitions_ensure(%s)", day)
    for table in (*PARENTS, "flows", "batches", "endpoints", "rollup_due", "rollup_minutes"):
        where = "" if table.startswith("rollup") else f" where batch_id = '{batch.batch_id}'"
        await scene.do(f"update {table} set batch_day = %s{where}", day)  # noqa: S608 - constants
    return day


async def texts(scene: Scene, batch: Batch) -> list[tuple[object, ...]]:
    return await scene.rows(
        "select q.body::text, r.body::text, q.erased_at is not null, r.output_tokens"
        " from item_requests q left join item_results r using (workspace_id, batch_day, batch_id, seq)"
        " where q.batch_id = %s order by q.seq",
        batch.batch_id,
    )


async def partitions(scene: Scene, day: date) -> list[str]:
    rows = await scene.rows(
        "select relname::text from pg_class where relkind = 'r' and relname like %s order by 1",
        f"%\\_{day:%Y%m%d}",
    )
    return [str(row[0]) for row in rows]


def keeping(**days: int) -> Settings:
    return Settings.model_validate({f"retention_{name}": number for name, number in days.items()})


async def test_erasing_a_batch_leaves_its_facts(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await finished(scene)
        other = await finished(scene)
        async with scene.db.transaction() as conn:
            await retention.request_erasure(
                conn, workspace_id=scene.workspace_id, batch_id=batch.batch_id
            )
        assert await retention.erase_batch(scene.db, batch=going(batch))
        assert await texts(scene, batch) == [("null", "null", True, 20)] * 2
        assert (await texts(scene, other))[0][0] != "null"
        after = await scene.batch(batch.batch_id)
        assert (after.texts_are_erased, after.output_tokens) == (True, 40)
        assert after.cost_nano == batch.cost_nano > 0
        await scene.check_books()


async def test_one_items_texts_go_alone_and_only_when_it_has_ended(database: str) -> None:
    async with Scene.open(database) as scene:
        batch = await scene.submit(3)
        await scene.settle((await scene.claim(2)).items, Outcome.rejected, used=None)
        async with scene.db.transaction() as conn:
            erased = await retention.erase_items(
                conn,
                workspace_id=scene.workspace_id,
                batch_day=batch.batch_day,
                batch_id=batch.batch_id,
                seqs=[0, 2],
            )
        assert erased == 1
        assert [row[2] for row in await texts(scene, batch)] == [True, False, False]
        # What was erased cannot be asked again; the other failed one can.
        await scene.settle((await scene.claim()).items)
        assert await scene.redrive(batch) == 1
        assert [item.seq for item in (await scene.claim()).items] == [1]


async def test_texts_go_by_policy_and_a_workspace_may_have_its_own(database: str) -> None:
    async with Scene.open(database) as ours:
        brief = await Scene.make(ours.db)
        async with ours.db.transaction() as conn:
            assert await retention.keep(
                conn, workspace_id=brief.workspace_id, days=None, texts_days=2
            )
        kept, gone = await finished(ours), await finished(brief)
        for batch in (kept, gone):
            await aged(ours, batch, 5)
        await retention.tidy(ours.db, keeping(texts_days=30))
        assert (await texts(ours, kept))[0][0] != "null"
        assert (await texts(brief, gone))[0][0] == "null"
        await retention.tidy(ours.db, keeping(texts_days=4))
        assert (await texts(ours, kept))[0][0] == "null"


async def test_a_day_is_dropped_when_nobody_keeps_it_and_rollups_and_counters_stay(
    database: str,
) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await finished(scene)
        await roll_up(scene)
        day = await aged(scene, batch, 10)
        await retention.tidy(scene.db, keeping(days=10))
        assert len(await partitions(scene, day)) == 7
        await retention.tidy(scene.db, keeping(days=9))
        assert await partitions(scene, day) == []
        assert (await scene.batch(batch.batch_id)).completed == 2
        assert await scene.value("select sum(calls)::int from report.throughput_per_hour") == 2
        assert await scene.value("select sum(answered)::int from report.cost_per_day") == 2
        # The rest goes on as before.
        await finished(scene)
        await roll_up(scene)
        assert await scene.value("select sum(calls)::int from report.throughput_per_hour") == 4


async def test_events_and_attempts_may_go_first(database: str) -> None:
    async with Scene.open(database) as scene:
        batch = await finished(scene)
        await roll_up(scene)
        day = await aged(scene, batch, 10)
        await retention.tidy(scene.db, keeping(events_days=3))
        left = await partitions(scene, day)
        assert [name.rpartition("_")[0] for name in left] == [
            "attempts",
            "deliveries",
            "delivery_attempts",
            "item_requests",
            "item_results",
            "items",
        ]


@pytest.mark.parametrize("what", ["unfinished", "not rolled up", "kept by one"])
async def test_a_day_stays_while_somebody_needs_it(database: str, what: str) -> None:
    async with Scene.open(database) as scene:
        batch = await finished(scene)
        if what != "not rolled up":
            await roll_up(scene)
        if what == "unfinished":
            batch = await scene.submit(1)
        if what == "kept by one":
            await scene.do("update workspaces set keep_days = 100")
        day = await aged(scene, batch, 10)
        await retention.tidy(scene.db, keeping(days=3))
        assert len(await partitions(scene, day)) == 7


async def test_rows_of_a_workspace_that_keeps_them_shorter_are_deleted(database: str) -> None:
    async with Scene.open(database) as ours:
        brief = await Scene.make(ours.db)
        await ours.do(
            "update workspaces set keep_days = 2 where workspace_id = %s", brief.workspace_id
        )
        kept, gone = await told(ours), await told(brief)
        await roll_up(ours)
        await aged(ours, kept, 5)
        await aged(ours, gone, 5)
        for _ in range(2):
            await retention.tidy(ours.db, keeping(days=30))
        for table in PARENTS:
            counted = f"select count(*)::int from {table} where batch_id = %s"  # noqa: S608 - constants
            assert await ours.value(counted, gone.batch_id) == 0, table
            assert await ours.value(counted, kept.batch_id) > 0, table


async def test_what_is_to_be_told_is_told_before_it_is_forgotten(database: str) -> None:
    """Then the callback's endpoint goes, with its secret; the environment's webhook stays."""
    async with Scene.open(database) as scene:
        await scene.do("update workspaces set keep_days = 2")
        batch, recent = await told(scene), await told(scene)
        await roll_up(scene)
        await aged(scene, batch, 5)
        await scene.do(
            "update deliveries set status = 'pending', reason = null, ended_at = null"
            " where batch_id = %s and seq is null and endpoint_id = batch_id",
            batch.batch_id,
        )
        tries = "select count(*)::int from delivery_attempts where batch_id = %s"
        endpoints = "select array_agg(batch_id order by batch_id) from endpoints"
        await retention.tidy(scene.db, keeping())
        left = await scene.rows(
            "select status::text, topic from deliveries where batch_id = %s", batch.batch_id
        )
        assert left == [("pending", "batch_update")]
        assert await scene.value(tries, batch.batch_id) == 1
        assert await scene.value(endpoints) == [batch.batch_id, recent.batch_id, None]
        await scene.do(ENDED)
        await retention.tidy(scene.db, keeping())
        assert await scene.value(tries, batch.batch_id) == 0
        assert await scene.value(tries, recent.batch_id) == 4
        assert await scene.value(endpoints) == [recent.batch_id, None]


async def test_a_callback_goes_with_its_day(database: str) -> None:
    async with Scene.open(database) as scene:
        batch = await told(scene)
        await roll_up(scene)
        await aged(scene, batch, 10)
        callbacks = "select count(*)::int from endpoints where batch_id is not null"
        await retention.tidy(scene.db, keeping())
        await retention.tidy(scene.db, keeping(days=10))
        assert await scene.value(callbacks) == 1
        await retention.tidy(scene.db, keeping(days=9))
        assert await scene.value(callbacks) == 0


async def test_a_reader_of_an_old_day_delays_its_end_and_stops_no_claim(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two connections: an analyst reads the day for long; claims go on while it is being detached."""
    monkeypatch.setattr(retention, "_LOCK_TIMEOUT", "300ms")
    async with Scene.open(database) as scene, scene.session() as analyst:
        batch = await finished(scene)
        await roll_up(scene)
        day = await aged(scene, batch, 10)
        await analyst.execute("select count(*) from items")
        tidying = asyncio.create_task(retention.tidy(scene.db, keeping(days=3)))
        while not tidying.done():
            await asyncio.wait_for(finished(scene, 1), 5)
        await tidying
        assert len(await partitions(scene, day)) == 7
        await analyst.rollback()
        await retention.tidy(scene.db, keeping(days=3))
        assert await partitions(scene, day) == []


async def test_minutes_are_forgotten_and_hours_stay(database: str) -> None:
    async with Scene.open(database) as scene:
        await finished(scene)
        await roll_up(scene)
        for table, column in (
            ("rollup_minutes", "minute_at"),
            ("rollup_latency_minutes", "minute_at"),
            ("rollup_hours", "hour_at"),
        ):
            await scene.do(f"update {table} set {column} = {column} - interval '50 days'")  # noqa: S608 - constants
        await retention.tidy(scene.db, keeping(minutes_days=40))
        assert await scene.value("select count(*)::int from rollup_minutes") == 0
        assert await scene.value("select count(*)::int from rollup_hours") == 1
