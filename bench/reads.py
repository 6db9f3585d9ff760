"""How long do the status reads take with five million items of history?

Method
------
A tenant with 5,000,000 ended items (requests, answers, attempts, events) in batches of a hundred to
a hundred thousand, made by SQL and analysed. One client reads over HTTP, one request after the other:
a batch without its items, the list of the newest hundred, a page of a hundred items from anywhere in a
batch. Batches are drawn at random. The time is the client's, from sending to the last byte.
"""

import asyncio
import random
from urllib.parse import quote

import msgspec

from bench import _figures
from bench._api import Api, key_of, serving
from bench._figures import Figure, Part, Run, centile
from bench._filling import fill
from bench._rig import Rig

LIMIT_S = 600.0
TARGET_MS = 20.0


class _Page(msgspec.Struct, rename="camel"):
    next_cursor: str | None = None


def _reads(api: Api, batch_ids: list[str], number: int) -> dict[str, list[float]]:
    """Times of each kind of read, in turns."""
    draw = random.Random(1)  # noqa: S311 - the same reads in every run
    took: dict[str, list[float]] = {"GET batch": [], "list batches": [], "list items, a page": []}
    cursors: dict[str, str | None] = {}
    for _ in range(number):
        batch_id = draw.choice(batch_ids)
        took["GET batch"].append(api.get(f"/{batch_id}?includesItems=false")[0])
        took["list batches"].append(api.get("?limit=100")[0])
        cursor = cursors.get(batch_id)
        after = f"&cursor={quote(cursor)}" if cursor else ""
        ms, body = api.get(f"/{batch_id}/items?limit=100{after}")
        cursors[batch_id] = msgspec.json.decode(body, type=_Page).next_cursor
        took["list items, a page"].append(ms)
    return took


async def measure(run: Run) -> Part:
    """Fill, then read."""
    part = Part()
    async with Rig.open(run.home, database="reads", pool=3) as rig:
        resource_id = await rig.create_resource("reads")
        batch_ids: list[str] = []
        async with rig.db.connection() as conn:
            for number, items in (
                (run.size(10_000, 100), 100),
                (run.size(1_000, 2), 1_000),
                (run.size(30, 1), run.size(100_000, 10_000)),
            ):
                made = await fill(conn, rig.ids, resource_id, number=number, items=items, done=True)
                batch_ids += [str(batch_id) for batch_id in made[-200:]]
            await conn.execute("vacuum analyze")
            row = await (await conn.execute("select count(*) from items")).fetchone()
            assert row is not None
        with serving(rig, await key_of(rig)) as api:
            await asyncio.to_thread(_reads, api, batch_ids[:20], 20)
            took = await asyncio.to_thread(_reads, api, batch_ids, run.size(1_000, 60))
    part.figures += [
        Figure(
            what=f"{name}, {row[0]:,} items of history, p99",
            unit="ms",
            ours=centile(times, 99),
            target=f"< {TARGET_MS:g}",
            met=centile(times, 99) < TARGET_MS,
            limits={"p50": centile(times, 50)},
        )
        for name, times in took.items()
    ]
    return part


def main() -> None:
    """Alone."""
    _figures.run("reads", measure)
