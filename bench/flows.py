"""Does scheduling keep up with 10,000 batches at once at 600,000 requests per minute?

Method
------
A resource with a limit of 600,000 requests per minute and batches made by SQL. Claims of 500 are timed, each
committed, and what they take is given back by SQL between them, so that all batches stay as they are: with
10, 1,000 and 10,000 batches that all have work (active), and with ten active ones beside 10,000 that cannot
be claimed from: paused; waiting for a limit of their own; all in flight; waiting for a later retry (idle).
600,000 a minute are 20 claims of 500 per second, so 50 ms is what a claim may take at most; that holds with
one claimer and a core for it.
"""

import time
from typing import LiteralString
from uuid import UUID

from app.capacity import Amount
from app.db import Connection
from bench import _figures
from bench._figures import Figure, Part, Run, centile
from bench._filling import fill
from bench._queueing import PLANS, Engine
from bench._rig import Rig

LIMIT_S = 210.0
AMOUNTS = [Amount(period="minute", requests=600_000, tokens=10**13)]
WANT = 500
ITEMS = 10

_IDLE: dict[str, LiteralString] = {
    "paused": "update flows set is_paused = true where batch_id = any (%(idle)s)",
    "waiting for a limit": """
        update flows set waits_until = now() + interval '1 hour', waits_for = resource_id
        where batch_id = any (%(idle)s)
    """,
    "all in flight": """
        with taken as (
            update items i set status = 'running', attempt = 1, worker_id = i.resource_id, claimed_at = now(),
                reserved_limits = '{}', visible_at = now() + interval '1 day'
            where i.batch_id = any (%(idle)s)
        )
        update flows set pending = 0, unstarted = 0, running = total where batch_id = any (%(idle)s)
    """,
    "waiting to retry": """
        with again as (
            update items i set attempt = 1, failures = 1, visible_at = now() + interval '1 day'
            where i.batch_id = any (%(idle)s)
        )
        update flows set unstarted = 0 where batch_id = any (%(idle)s)
    """,
}
_GIVE_BACK: tuple[LiteralString, ...] = (
    (
        "update flows set pending = pending + running, unstarted = unstarted + running, running = 0, floor = 0"
        " where resource_id = %(resource)s and running > 0 and not batch_id = any (%(idle)s)"
    ),
    (
        "update items set status = 'pending', attempt = 0, worker_id = null, claimed_at = null, reserved_limits = null"
        " where resource_id = %(resource)s and status = 'running' and not batch_id = any (%(idle)s)"
    ),
    "delete from ledger",
)


async def _claims_ms(
    conn: Connection, engine: Engine, *, claims: int, idle: list[UUID]
) -> list[float]:
    """Time of each claim; the first ones plan their statements and do not count."""
    took: list[float] = []
    for turn in range(claims + 3):
        begun = time.perf_counter()
        claimed = await engine.claim(conn)
        if turn >= 3:
            took.append((time.perf_counter() - begun) * 1000)
        assert claimed
        async with conn.transaction():
            for statement in _GIVE_BACK:
                await conn.execute(statement, {"resource": engine.resource_id, "idle": idle})
    return took


async def _with(
    rig: Rig,
    name: str,
    *,
    active: int,
    idle: int,
    claims: int,
    becomes: LiteralString | None = None,
) -> list[float]:
    engine = await Engine.make(rig, name=name, want=WANT, amounts=AMOUNTS)
    async with rig.db.connection() as conn:
        items = max(ITEMS, WANT // active)
        await fill(conn, rig.ids, engine.resource_id, number=active, items=items)
        others: list[UUID] = []
        if becomes is not None:
            others += await fill(conn, rig.ids, engine.resource_id, number=idle, items=ITEMS)
            await conn.execute(becomes, {"idle": others})
        await conn.execute("vacuum analyze")
        await conn.execute(PLANS)
        return await _claims_ms(conn, engine, claims=claims, idle=others)


async def measure(run: Run) -> Part:
    """Active ones, then each kind of idle ones."""
    part = Part()
    claims = run.size(40, 8)
    most = run.size(10_000, 1_000)
    async with Rig.open(run.home, database="flows", pool=3) as rig:
        active = {
            number: await _with(rig, f"{number} active", active=number, idle=0, claims=claims)
            for number in (10, most // 10, most)
        }
        idle = {
            name: await _with(rig, name, active=10, idle=most, claims=claims, becomes=becomes)
            for name, becomes in _IDLE.items()
        }
    ten = centile(active[10], 50)
    p50 = centile(active[most], 50)
    part.figures.append(
        Figure(
            what=f"claim of {WANT} with {most:,} batches active, p50",
            unit="ms",
            ours=p50,
            target="≤ 50 (600,000/min)",
            met=p50 <= 50,
            limits={f"with {number:,}": centile(ms, 50) for number, ms in active.items()},
        )
    )
    part.figures += [
        Figure(
            what=f"claim of {WANT} from ten beside {most:,} {name}, p50",
            unit="ms",
            ours=centile(ms, 50),
            target="no growth",
            met=centile(ms, 50) <= 1.2 * ten,
            limits={"beside none": ten},
        )
        for name, ms in idle.items()
    ]
    part.curves["flows: ms per claim of 500 by active batches"] = {
        "ours": [(float(number), centile(ms, 50)) for number, ms in active.items()]
    }
    return part


def main() -> None:
    """Alone."""
    _figures.run("flows", measure)
