"""What an item costs, in figures that no noise can touch: WAL, commits, statements, dead rows.

`bench.efficiency` states the same figures and its method. Here they are bounded, so that nobody loses them.
"""

from pathlib import Path

import psycopg

from app.db import Connection
from bench._queueing import Engine, PlainRows, wal_of
from tests.scene import Scene

#: As a worker with many calls in flight claims and flushes.
WANT = 500
ROUNDS = 4


def _engine(scene: Scene, *, want: int) -> Engine:
    return Engine(
        workspace_id=scene.workspace_id,
        resource_id=scene.resource_id,
        connection_id=scene.connection_id,
        worker_id=scene.worker_id,
        want=want,
    )


async def _bytes_of_ours(scene: Scene, conn: Connection) -> float:
    """Least WAL bytes per item of a claim and of a settlement."""
    engine = _engine(scene, want=WANT)
    claims: list[int] = []
    settlements: list[int] = []
    for _ in range(ROUNDS):
        items, claimed = await wal_of(conn, engine.claim)
        _, settled = await wal_of(conn, lambda c, some=items: engine.record(c, some))
        assert len(items) == WANT
        claims.append(claimed)
        settlements.append(settled)
    return (min(claims) + min(settlements)) / WANT


async def _bytes_of_the_rows(scene: Scene, conn: Connection) -> float:
    """The same of the rows alone."""
    batch = await scene.submit(WANT * ROUNDS)
    rows = PlainRows(batch=batch, engine=_engine(scene, want=WANT))
    claims: list[int] = []
    settlements: list[int] = []
    for _ in range(ROUNDS):
        seqs, claimed = await wal_of(conn, rows.claim)
        _, settled = await wal_of(conn, lambda c, some=seqs: rows.record(c, some))
        assert len(seqs) == WANT
        claims.append(claimed)
        settlements.append(settled)
    return (min(claims) + min(settlements)) / WANT


async def test_an_item_writes_little_more_wal_than_its_rows_alone(database: str) -> None:
    """Full-page images are off in the tests' cluster; the least of several rounds has nobody else's WAL."""
    async with (
        Scene.open(database, rpm=10**9, tpm=10**12, connection_rpm=10**9, pool=2) as scene,
        scene.db.connection() as conn,
    ):
        for _ in range(4):
            await scene.submit(WANT * ROUNDS // 4)
        ours = await _bytes_of_ours(scene, conn)
        plain = await _bytes_of_the_rows(scene, conn)
        assert ours <= 1.3 * plain, (ours, plain)


async def test_five_hundred_items_take_two_commits_and_few_statements(
    database: str, tmp_path: Path
) -> None:
    async with (
        Scene.open(database, rpm=10**9, pool=2) as scene,
        await psycopg.AsyncConnection.connect(scene.db.url, autocommit=True) as conn,
    ):
        await scene.submit(WANT)
        engine = _engine(scene, want=WANT)
        with (tmp_path / "protocol").open("w") as protocol:
            conn.pgconn.trace(protocol.fileno())
            items = await engine.claim(conn)
            await engine.record(conn, items)
            conn.pgconn.untrace()
        sent = [
            line
            for line in (tmp_path / "protocol").read_text().splitlines()
            if "\tF\t" in line and ("\tExecute" in line or "\tQuery" in line)
        ]
        assert len(items) == WANT
        # Whoever wrote a row is noted in it, so this counts commits of ours and of nobody else on the server.
        writers = await scene.value(
            "select count(distinct writer) from ("
            "select xmin::text from items union all select xmin::text from attempts"
            " union all select xmin::text from item_results union all select xmin::text from ledger"
            " union all select xmin::text from events where kind <> 'batch-created'"
            " union all select xmin::text from flows"
            ") w (writer)"
        )
        assert writers == 2
        assert 2 < len(sent) <= 0.05 * WANT, sent


async def test_dead_rows_are_few_per_exchange_whatever_its_size(database: str) -> None:
    """Per item two dead versions of its row; per claim and settlement a few of each shared row."""
    exchanges = 10
    async with (
        Scene.open(database, rpm=10**9, connection_rpm=10**9, pool=2) as scene,
        scene.db.connection() as conn,
    ):
        # What only this database's tables count, without autovacuum meddling.
        for table in ("flows", "batches", "ledger", "resource_states", "scope_states", "ready"):
            await scene.do(f"alter table {table} set (autovacuum_enabled = off)")
        await scene.submit(200 * exchanges)
        engine = _engine(scene, want=200)
        before = await _updated(scene)
        for _ in range(exchanges):
            await engine.record(conn, await engine.claim(conn))
        await conn.execute("select pg_stat_force_next_flush()")
        changed = {
            table: number - before.get(table, 0)
            for table, number in (await _updated(scene)).items()
        }
        assert changed["items"] == 2 * 200 * exchanges
        shared = sum(number for table, number in changed.items() if table != "items")
        # A flow twice, each of three limits' slots twice, what replies teach and ready once each.
        assert shared <= 12 * exchanges, changed


async def _updated(scene: Scene) -> dict[str, int]:
    """Rows updated so far, by table: each leaves a dead version."""
    rows = await scene.rows(
        "select regexp_replace(relname, '_[0-9]+$', ''), sum(n_tup_upd)::int from pg_stat_user_tables"
        " group by 1 having sum(n_tup_upd) > 0"
    )
    return dict(rows)
