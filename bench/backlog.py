"""Does a claim take longer when a million items wait than when ten thousand do?

Method
------
Two resources of one tenant: ten batches of 1,000 pending items on one, ten of 100,000 on the other, made by
SQL and vacuumed as autovacuum would have done meanwhile. Then claims of 20 items, in turns from the
one and from the other, each committed; the time is the client's, commit included.
"""

import time

from bench import _figures
from bench._figures import Figure, Part, Run, centile
from bench._filling import fill
from bench._queueing import PLANS, Engine
from bench._rig import Rig

LIMIT_S = 210.0


async def measure(run: Run) -> Part:
    """Few and many, in turns."""
    part = Part()
    few, many = run.size(1_000, 300), run.size(100_000, 3_000)
    async with Rig.open(run.home, database="backlog", pool=3) as rig, rig.db.connection() as conn:
        engines = {items: await Engine.make(rig, name=f"{items}", want=20) for items in (few, many)}
        for items, engine in engines.items():
            await fill(conn, rig.ids, engine.resource_id, number=10, items=items)
        await conn.execute("vacuum analyze")
        await conn.execute(PLANS)
        took: dict[int, list[float]] = {few: [], many: []}
        for turn in range(run.size(400, 60)):
            for items, engine in engines.items():
                begun = time.perf_counter()
                claimed = await engine.claim(conn)
                if turn >= 5:  # the first claims of a connection plan their statements
                    took[items].append((time.perf_counter() - begun) * 1000)
                assert len(claimed) == 20
    for name, number in (("p50", 50), ("p99", 99)):
        ours, small = centile(took[many], number), centile(took[few], number)
        part.figures.append(
            Figure(
                what=f"claim of 20 with {10 * many:,} pending, {name}",
                unit="ms",
                ours=ours,
                target=f"≤ 1.5 times with {10 * few:,}",
                met=ours <= 1.5 * small,
                limits={f"with {10 * few:,}": small},
            )
        )
    return part


def main() -> None:
    """Alone."""
    _figures.run("backlog", measure)
