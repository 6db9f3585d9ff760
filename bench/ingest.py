"""How fast does the API take in a batch of 100,000 items, against a bare COPY of the same rows?

Method
------
One request with 100,000 items of about 600 bytes, each different, sent as fast as it is taken; the time runs
from its first byte to the end of the answer, token estimates and commit included. The bare COPY writes the
same rows to items and item_requests, prepared beforehand, in one transaction with the same driver.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator
from uuid import UUID

from app import intake
from app.ids import uuid7
from app.intake import NewBatch
from bench import _figures
from bench._api import Api, key_of, serving
from bench._figures import Figure, Part, Run
from bench._rig import Rig
from bench.http_clients import REQUEST

LIMIT_S = 150.0


def requests(number: int) -> Iterator[bytes]:
    """Requests of the usual size, each different."""
    for n in range(number):
        yield REQUEST.replace(b"word word", b"word %07d" % n, 1)


def body(resource_id: UUID, bodies: list[bytes]) -> list[bytes]:
    """The pieces of a request that creates a batch of them."""
    one = b'{"resourceId":"%b","request":' % str(resource_id).encode()
    pieces = [one + text + b"}," for text in bodies]
    pieces[-1] = pieces[-1].removesuffix(b",")
    return [b'{"type":"ASYNC","items":[', *pieces, b"]}"]


def created(api: Api, pieces: list[bytes]) -> float:
    """Seconds that the API took for it; pieces are put together to a useful size."""
    together = [b"".join(pieces[start : start + 200]) for start in range(0, len(pieces), 200)]
    took, _ = api.post("", together, sum(map(len, together)))
    return took


async def _copied(rig: Rig, resource_id: UUID, bodies: list[bytes]) -> float:
    """Seconds of the bare COPY."""
    batch = NewBatch(type="async", batch_id=uuid7(), **rig.ids)
    key = (rig.ids["workspace_id"], batch.batch_day, batch.batch_id)
    items = [(*key, resource_id, n, 100, 64) for n in range(len(bodies))]
    texts = [(*key, n, text.decode()) for n, text in enumerate(bodies)]
    async with rig.db.connection() as conn:
        await intake.prepare_day(conn, batch)
        begun = time.perf_counter()
        async with conn.transaction(), conn.cursor() as cursor:
            async with cursor.copy(
                "copy items (workspace_id, batch_day, batch_id, resource_id, seq, input_tokens,"
                " max_output_tokens) from stdin"
            ) as copy:
                for row in items:
                    await copy.write_row(row)
            async with cursor.copy(
                "copy item_requests (workspace_id, batch_day, batch_id, seq, body) from stdin"
            ) as copy:
                for row in texts:
                    await copy.write_row(row)
        return time.perf_counter() - begun


async def measure(run: Run) -> Part:
    """In turns."""
    part = Part()
    items = run.size(100_000, 5_000)
    ours: list[float] = []
    bare: list[float] = []
    async with Rig.open(run.home, database="ingest", pool=3) as rig:
        resource_id = await rig.create_resource("ingest")
        bodies = list(requests(items))
        with serving(rig, await key_of(rig)) as api:
            for _ in range(run.size(3, 1)):
                pieces = body(resource_id, bodies)
                ours.append(items / await asyncio.to_thread(created, api, pieces))
                bare.append(items / await _copied(rig, resource_id, bodies))
    rate, limit = statistics.median(ours), statistics.median(bare)
    part.figures.append(
        Figure(
            what=f"ingest of {items:,} items through the API, estimated",
            unit="items/s",
            ours=rate,
            target="≥ 50 % of COPY",
            met=rate >= 0.5 * limit,
            limits={"bare COPY": limit},
        )
    )
    return part


def main() -> None:
    """Alone."""
    _figures.run("ingest", measure)
