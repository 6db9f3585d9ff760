"""What does an item cost in WAL, commits, statements and dead rows?

Method
------
These do not depend on the machine's speed. Batches of items without a limit that binds are claimed and
settled one after the other on one connection; creation is not counted. ``EXPLAIN (ANALYZE, WAL)`` of each
call says what this backend wrote, functions inside included, so nobody else's WAL is counted; full-page
images are switched off for the run. The bodies that are stored (answers) count as payload. The same rows
are written without ledger and flows by `bench._queueing.PlainRows`. Statements are those that a worker
sends, ``begin`` and ``commit`` included. Dead rows are those of ``pg_stat_user_tables`` after the churn
and a vacuum that autovacuum would have made, and without one.

At 500 items per claim and commit, and at the ten that come together at 10 items/s.
"""

import statistics
from typing import Any

from app.db import Connection
from bench import _figures
from bench._figures import Figure, Part, Run
from bench._queueing import Engine, PlainRows, wal_of
from bench._rig import Rig
from bench.http_clients import ANSWER, REQUEST

LIMIT_S = 90.0
#: begin, the call, commit.
STATEMENTS = 3
HOT = ("flows", "batches", "ledger", "resource_states", "scope_states", "ready", "items%")


async def wal_per_item(rig: Rig, *, want: int, rounds: int, plain: bool) -> tuple[float, float]:
    """Median WAL bytes per item of claims and of settlements, of our verbs or of the rows alone."""
    engine = await Engine.make(rig, name=f"{'plain' if plain else 'ours'} {want}", want=want)
    batch = await rig.submit(engine.resource_id, [REQUEST] * (want * rounds))
    rows = PlainRows(batch=batch, engine=engine)
    claims: list[float] = []
    settlements: list[float] = []
    async with rig.db.connection() as conn:
        for _ in range(rounds):
            if plain:
                taken: Any
                taken, claimed = await wal_of(conn, rows.claim)
                _, settled = await wal_of(conn, lambda c, some=taken: rows.record(c, some))
            else:
                taken, claimed = await wal_of(conn, engine.claim)
                _, settled = await wal_of(conn, lambda c, some=taken: engine.record(c, some))
            claims.append(claimed / want)
            settlements.append(settled / want)
    return statistics.median(claims), statistics.median(settlements)


async def dead_rows(conn: Connection) -> dict[str, int]:
    """Dead rows of the tables that the verbs change, by table; partitions together."""
    await conn.execute("select pg_stat_force_next_flush()")
    found = await conn.execute(
        "select regexp_replace(relname, '_[0-9]+$', ''), sum(n_dead_tup) from pg_stat_user_tables"
        " where relname ~ '^(flows|batches|ledger|resource_states|scope_states|ready|items(_.*)?)$'"
        " group by 1"
    )
    return {name: int(rows) for name, rows in await found.fetchall()}


async def measure(run: Run) -> Part:
    """Both sizes, ours and the rows alone."""
    part = Part()
    async with Rig.open(run.home, database="efficiency", pool=3) as rig:
        async with rig.db.connection() as conn:
            await conn.execute("alter system set full_page_writes = off")
            await conn.execute("select pg_reload_conf()")
        try:
            for want, rounds in ((500, run.size(20, 3)), (10, run.size(200, 20))):
                ours = sum(await wal_per_item(rig, want=want, rounds=rounds, plain=False))
                plain = sum(await wal_per_item(rig, want=want, rounds=rounds, plain=True))
                ratio = ours / plain
                part.figures += [
                    Figure(
                        what=f"WAL per item, {want} per commit",
                        unit="bytes",
                        ours=ours,
                        target="≤ 1.3 times same rows" if want == 500 else "",
                        met=ratio <= 1.3 if want == 500 else None,
                        limits={"same rows": plain, "payload": float(len(ANSWER))},
                    ),
                    Figure(
                        what=f"WAL per item beyond its payload, {want} per commit",
                        unit="bytes",
                        ours=ours - len(ANSWER),
                        limits={"same rows": plain - len(ANSWER)},
                    ),
                    Figure(
                        what=f"commits per item, {want} per commit",
                        unit="",
                        ours=2 / want,
                        target="≤ 0.05" if want == 500 else "",
                        met=2 / want <= 0.05 if want == 500 else None,
                    ),
                    Figure(
                        what=f"statements per item, {want} per commit",
                        unit="",
                        ours=2 * STATEMENTS / want,
                        target="≤ 0.05" if want == 500 else "",
                        met=2 * STATEMENTS / want <= 0.05 if want == 500 else None,
                    ),
                ]
            async with rig.db.connection() as conn:
                dead = await dead_rows(conn)
                await conn.execute("vacuum")
                left = await dead_rows(conn)
        finally:
            async with rig.db.connection() as conn:
                await conn.execute("alter system reset full_page_writes")
                await conn.execute("select pg_reload_conf()")
    items = run.size(20, 3) * 500 * 2 + run.size(200, 20) * 10 * 2
    small = {name: rows for name, rows in dead.items() if not name.startswith("items")}
    part.figures.append(
        Figure(
            what=f"dead rows of the small hot tables after {items:,} items, unvacuumed",
            unit="rows",
            ours=float(sum(small.values())),
            target="bounded",
            met=sum(left.values()) == 0,
            note="dead rows: " + ", ".join(f"{n} {r}" for n, r in sorted(dead.items()) if r),
        )
    )
    return part


def main() -> None:
    """Alone."""
    _figures.run("efficiency", measure)
