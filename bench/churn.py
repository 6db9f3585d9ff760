"""Does the engine slow down while somebody holds a snapshot, as an analyst's long query or a dump does?

Method
------
A transaction at REPEATABLE READ reads the tables and stays open: no dead row and no dead index entry that the
engine makes from then on can be cleaned. Then items are claimed and settled, 500 at a time, in four batches
made before by SQL, until all of them or the time are used up. Each claim's time is kept; a claim during the
first tenth and the last one are compared, and both with an equal run before the snapshot.
"""

import time

import psycopg

from bench import _figures
from bench._figures import Figure, Part, Run, centile
from bench._filling import fill
from bench._queueing import Drive, Engine, drive
from bench._rig import Rig

LIMIT_S = 900.0
_CHURN_S = 600.0
BATCHES = 4


async def _run(rig: Rig, name: str, items: int, *, seconds: float) -> Drive:
    """Claim and settle so many items, or as many as the time allows."""
    engine = await Engine.make(rig, name=name)
    async with rig.db.connection() as conn:
        await fill(conn, rig.ids, engine.resource_id, number=BATCHES, items=items // BATCHES)
    until = time.monotonic() + seconds

    async def claim(conn: psycopg.AsyncConnection) -> list[object]:
        return list(await engine.claim(conn)) if time.monotonic() < until else []

    return await drive(rig.db.url, claim, engine.record)


def _curve(done: Drive) -> list[tuple[float, float]]:
    """Items so far, and the p50 of the claims about then."""
    width = max(len(done.claims_ms) // 40, 1)
    return [
        (at * 500.0, centile(done.claims_ms[at : at + width], 50))
        for at in range(0, len(done.claims_ms) - width + 1, width)
    ]


async def measure(run: Run) -> Part:
    """Without a snapshot, then with one."""
    part = Part()
    async with Rig.open(run.home, database="churn", pool=3) as rig:
        free = await _run(rig, "free", run.size(100_000, 4_000), seconds=60)
        async with await psycopg.AsyncConnection.connect(rig.db.url) as holder:
            await holder.execute("set transaction isolation level repeatable read")
            await holder.execute("select count(*) from flows, items where false")
            held = await _run(rig, "held", run.size(2_000_000, 20_000), seconds=_CHURN_S)
            async with rig.db.connection() as conn:
                await conn.execute("select pg_stat_force_next_flush()")
                dead = await (
                    await conn.execute(
                        "select relname, n_dead_tup from pg_stat_user_tables where n_dead_tup > 100"
                        " order by n_dead_tup desc limit 8"
                    )
                ).fetchall()
    tenth = max(len(held.claims_ms) // 10, 2)
    first, last = held.claims_ms[:tenth], held.claims_ms[-tenth:]
    for name, number in (("p50", 50), ("p99", 99)):
        ours, before = centile(last, number), centile(free.claims_ms, number)
        part.figures.append(
            Figure(
                what=f"claim of 500 after {held.items:,} items with a snapshot held, {name}",
                unit="ms",
                ours=ours,
                target="≤ 2 times without",
                met=ours <= 2 * before,
                limits={"without": before, "first tenth": centile(first, number)},
            )
        )
    growth = centile(last, 50) / centile(first, 50)
    part.figures.append(
        Figure(
            what="last tenth of the claims against the first, p50",
            unit="times",
            ours=growth,
            target="no growth",
            met=growth <= 1.15,
            limits={"items/s without": free.rate, "items/s with": held.rate},
            note="churn: dead rows " + ", ".join(f"{name} {rows:,}" for name, rows in dead),
        )
    )
    part.curves["churn: ms per claim of 500 by items since the snapshot"] = {
        "snapshot held": _curve(held),
        "none": _curve(free),
    }
    return part


def main() -> None:
    """Alone."""
    _figures.run("churn", measure)
