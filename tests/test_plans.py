"""The hot statements touch a bounded number of rows per item, whatever the tables' statistics say.

A plan made for an empty table once read 2.8 million index entries to update 500 rows. This counts
what Postgres itself says it read, so it catches any plan that scans, however fast the machine.
"""

from typing import Any

from psycopg import sql

from app.db import Connection, NoRow, Query
from app.ids import created_on
from app.queue import Outcome
from bench._filling import fill
from tests.scene import Scene

ITEMS = 4000
#: What a list of batches may be narrowed by, besides metadata.
_FILTERS = (
    "before",
    "name",
    "types",
    "statuses",
    "created_from",
    "created_before",
    "api_key_id",
    "resource_id",
)
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


async def test_what_is_asked_of_every_item_is_inlined(database: str) -> None:
    """A function of SQL that is not inlined is a statement of its own: five microseconds for each row."""
    async with Scene.open(database, pool=1) as scene, scene.db.connection() as conn:
        for call in (
            "call_cost(o, f, n, n, n, n, n, x, x, x)",
            "counts_after(p, f, t, i)",
            "delivery_topic(k)",
            "duration_bucket(d)",
            "first_share(b)",
            "pace_room(d, d)",
            "slot_frees_at(p, f, t, i)",
            "slot_of(p, f, t)",
            "urgency(t, t, t)",
        ):
            query = sql.SQL(
                "explain (verbose, format json) select {} from (select true as f, 1 as n, 1::bigint as b,"
                " 1.0 as x, 1.0::float8 as d, now() as t, interval '1 s' as i, 'minute'::limit_period as p,"
                " null::attempt_outcome as o, 'item-failed'::event_kind as k offset 0) v"
            ).format(sql.SQL(call))
            row = await (await conn.execute(query)).fetchone()
            assert row is not None
            assert call.split("(")[0] not in str(row[0]), call


async def test_status_reads_keep_their_indexes(database: str) -> None:
    """With history and statistics, no read of a batch, its items or its events walks a table."""
    async with Scene.open(database, pool=2) as scene, scene.db.connection() as conn:
        ids = {"workspace_id": scene.workspace_id, "environment_id": scene.environment_id}
        await fill(conn, ids, scene.resource_id, number=600, items=2, done=True)
        made = await fill(conn, ids, scene.resource_id, number=15, items=1000, done=True)
        await conn.execute("analyze")
        batch: dict[str, Any] = {
            **ids,
            "batch_id": made[7],
            "batch_day": created_on(made[7]),
            "most": 100,
        }
        for file, name, params, indexes in (
            ("batches", "batch_get", {}, {"batches_pkey", "flows_pkey"}),
            (
                "batches",
                "batches_page",
                dict.fromkeys(_FILTERS) | {"metadata": "{}"},
                {"batches_newest", "flows_pkey"},
            ),
            (
                "items",
                "items_some",
                {"seqs": list(range(500, 600))},
                {
                    "batches_pkey",
                    "flows_pkey",
                    "items_pkey",
                    "item_requests_pkey",
                    "item_results_pkey",
                    "attempts_pkey",
                },
            ),
            ("events", "events_after", {"after": 300}, {"events_pkey"}),
        ):
            used, walked = await _plan(conn, Query(file, name, NoRow).sql, batch | params)
            # A tenant has few accounts and models.
            assert walked <= {"connections", "resources"}, name
            used -= {"connections_pkey", "resources_pkey"}
            # Either index of batches leads to a single row of a known environment.
            assert {*used, "batches_pkey"} - {"batches_newest"} == {*indexes, "batches_pkey"} - {
                "batches_newest"
            }, name


async def test_a_claim_finds_its_candidates_by_their_index(database: str) -> None:
    """Beside history, with fresh statistics and without: only the index of first attempts, and few of its entries."""
    async with Scene.open(database, pool=2) as scene, scene.db.connection() as conn:
        ids = {"workspace_id": scene.workspace_id, "environment_id": scene.environment_id}
        await fill(conn, ids, scene.resource_id, number=10, items=1000, done=True)
        await fill(conn, ids, scene.resource_id, number=4, items=1000)
        for statement in ("select 1", "analyze"):
            await conn.execute(statement.encode())
            scanned, _ = await _read(scene)
            entries = await _entries(scene, "items_first")
            claim = await scene.claim(CLAIM)
            assert len(claim.items) == CLAIM
            assert (await _read(scene))[0] == scanned
            assert CLAIM <= await _entries(scene, "items_first") - entries <= 4 * (CLAIM + 1)


async def test_a_claim_does_not_read_what_others_wait_to_retry(database: str) -> None:
    """Whether a flow has a due retry is one probe, not a hash of all that anybody is to try again."""
    async with Scene.open(database, pool=2) as scene, scene.db.connection() as conn:
        other = await Scene.make(scene.db)
        ids = {"workspace_id": other.workspace_id, "environment_id": other.environment_id}
        await fill(conn, ids, other.resource_id, number=2, items=2000)
        await conn.execute("update items set attempt = 1, failures = 1")
        await conn.execute("update flows set unstarted = 0")
        ours = [await scene.submit(1) for _ in range(20)]
        claimed = await scene.claim(20)
        await scene.settle(claimed.items, Outcome.unreachable, wait_s=0)
        await conn.execute("analyze")
        entries = await _entries(scene, "items_again")
        again = await scene.claim(20)
        assert {item.batch_id for item in again.items} == {batch.batch_id for batch in ours}
        assert await _entries(scene, "items_again") - entries < 200


async def _plan(
    conn: Connection, statement: bytes, params: dict[str, Any]
) -> tuple[set[str], set[str]]:
    """Indexes that a plan uses, by the names of the partitioned ones, and tables that it walks."""
    row = await (await conn.execute(b"explain (format json) " + statement, params)).fetchone()
    assert row is not None
    rows = await (
        await conn.execute(
            "select c.relname, p.relname from pg_inherits h join pg_class c on c.oid = h.inhrelid"
            " join pg_class p on p.oid = h.inhparent"
        )
    ).fetchall()
    parents = dict(rows)
    used: set[str] = set()
    walked: set[str] = set()
    nodes = [row[0][0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if "Index Name" in node:
            used.add(parents.get(node["Index Name"], node["Index Name"]))
        elif node["Node Type"] == "Seq Scan":
            walked.add(node["Relation Name"])
    return used, walked


async def _entries(scene: Scene, index: str) -> int:
    """Entries of a partitioned index that were read so far."""
    async with scene.db.connection() as conn:
        await conn.execute("select pg_stat_force_next_flush()")
    return int(
        await scene.value(
            "select sum(s.idx_tup_read) from pg_stat_user_indexes s"
            " join pg_inherits h on h.inhrelid = s.indexrelid where h.inhparent = %s::regclass",
            index,
        )
    )


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
