"""The hot statements touch a bounded number of rows per item, whatever the tables' statistics say.

A plan made for an empty table once read 2.8 million index entries to update 500 rows. This counts
what Postgres itself says it read, so it catches any plan that scans, however fast the machine.
"""

from app.db import Connection
from tests.scene import Scene

ITEMS = 4000
CLAIM = 200


async def _read(scene: Scene) -> tuple[int, int]:
    """Rows read by sequential scans, and index entries read, of the tables of a batch's rows."""
    async with scene.db.connection() as conn:
        await conn.execute("select pg_stat_force_next_flush()")
    async with scene.db.connection() as conn:
        await conn.execute("select pg_stat_clear_snapshot()")
        row = await (
            await conn.execute(
                """
                select sum(seq_tup_read), sum(
                    (select sum(idx_tup_read) from pg_stat_user_indexes x where x.relid = t.relid))
                from pg_stat_user_tables t
                where relname ~ '^(items|item_requests|item_results|attempts|events)_'
                """
            )
        ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


async def test_a_claim_and_a_settlement_read_a_few_index_entries_per_item(database: str) -> None:
    async with Scene.open(database, rpm=10**6, tpm=10**9, pool=1) as scene:
        batch = await scene.submit(ITEMS)
        seq_before, index_before = await _read(scene)
        for _ in range(ITEMS // CLAIM):
            claim = await scene.claim(CLAIM)
            await scene.settle(claim.items)
        assert (await scene.batch(batch.batch_id)).status == "completed"
        seq_after, index_after = await _read(scene)
        assert seq_after == seq_before
        assert (index_after - index_before) / ITEMS < 12


async def test_the_claim_does_not_walk_what_was_claimed_before(database: str) -> None:
    """With a snapshot held no dead index entry can be cleaned; the floor passes them by."""
    async with Scene.open(database, pool=2) as scene:
        await scene.submit(ITEMS)
        async with scene.db.connection() as holder, holder.transaction():
            await holder.execute("set transaction isolation level repeatable read")
            await holder.execute("select count(*) from items")
            costs: list[float] = []
            for _ in range(ITEMS // CLAIM):
                async with scene.db.connection() as conn:
                    before = await _buffers(conn)
                    claim = await scene.claim(CLAIM, conn=conn)
                    costs.append(await _buffers(conn) - before)
                await scene.settle(claim.items)
        first, last = sum(costs[1:4]), sum(costs[-3:])
        assert last < first * 1.6, costs


async def _buffers(conn: Connection) -> float:
    """Blocks of items and its indexes that were read so far."""
    await conn.execute("select pg_stat_force_next_flush()")
    row = await (
        await conn.execute(
            """
            select sum(idx_blks_hit + idx_blks_read + heap_blks_hit + heap_blks_read)
            from pg_statio_user_tables where relname ~ '^items_'
            """
        )
    ).fetchone()
    assert row is not None
    return float(row[0])
