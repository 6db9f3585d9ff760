"""Other queues on the same server with the same work: take it, do nothing, note that it is done.

Runs in the peers' own environment, of which nothing else of this project is a part:
``python _peers.py NAME URL ITEMS SECONDS`` prints one JSON object. Each uses its fastest documented way: its
own bulk insertion, its own worker with as many calls at once or as large a batch as helps it, its own way
to acknowledge many together. The clock runs from the worker's start to the last item done.
"""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportFunctionMemberAccess=false
# ruff: noqa: PLC0415 - each process loads only the peer it measures

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

BODY = {
    "model": "sluice-bench",
    "messages": [
        {"role": "system", "content": "You are a careful assistant."},
        {"role": "user", "content": "word " * 90},
    ],
    "max_tokens": 64,
}
PACKAGES = {
    "pgqueuer": "pgqueuer",
    "procrastinate": "procrastinate",
    "awa": "awa-pg",
    "pgmq": "pgmq",
}


class Count:
    """Items done, and when the last one was."""

    def __init__(self, items: int, seconds: float) -> None:
        self.items = items
        self.done = 0
        self.begun = self.last = time.perf_counter()
        self.until = self.begun + seconds
        self.enough = asyncio.Event()

    def begin(self) -> None:
        """Start the clock."""
        self.until += time.perf_counter() - self.begun
        self.begun = time.perf_counter()

    def add(self, number: int = 1) -> None:
        """So many more."""
        self.done += number
        self.last = time.perf_counter()
        if self.done >= self.items or self.last > self.until:
            self.enough.set()

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.done / (self.last - self.begun)


async def with_pgqueuer(url: str, count: Count) -> None:
    import asyncpg
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.models import Job
    from pgqueuer.queries import Queries
    from pgqueuer.types import QueueExecutionMode

    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    payload = json.dumps(BODY).encode()
    for start in range(0, count.items, 1000):
        some = min(1000, count.items - start)
        await queries.enqueue(["bench"] * some, [payload] * some, [0] * some)
    queue = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))

    @queue.entrypoint("bench")
    async def work(job: Job) -> None:
        del job
        count.add()

    count.begin()
    running = asyncio.create_task(
        queue.qm.run(batch_size=500, mode=QueueExecutionMode.drain)  # drain returns when empty
    )
    # What counts is that all is noted: drain ends after its buffers are flushed.
    await asyncio.wait({running}, timeout=count.until - time.perf_counter())
    if running.done():
        await running
        count.last = time.perf_counter()
    else:
        running.cancel()


async def with_procrastinate(url: str, count: Count) -> None:
    from procrastinate import App, PsycopgConnector

    app = App(connector=PsycopgConnector(conninfo=url))

    @app.task(name="bench")
    async def bench(body: object) -> None:
        del body
        count.add()

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for start in range(0, count.items, 1000):
            some = min(1000, count.items - start)
            await bench.batch_defer_async(*[{"body": BODY}] * some)
        count.begin()
        running = asyncio.create_task(
            app.run_worker_async(concurrency=20, wait=False, listen_notify=False)
        )
        await asyncio.wait({running}, timeout=count.until - time.perf_counter())
        if running.done():
            count.last = time.perf_counter()
        else:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running


async def with_awa(url: str, count: Count) -> None:
    from dataclasses import dataclass

    from awa import AsyncClient

    @dataclass
    class Bench:
        body: str

    # Its driver wants a host in its place, though the query names the socket.
    client = AsyncClient(url.replace("@/", "@localhost/"))
    await client.migrate()
    await client.install_queue_storage()

    @client.task(Bench, queue="bench")
    async def work(job: object) -> None:
        del job
        count.add()

    for start in range(0, count.items, 1000):
        some = min(1000, count.items - start)
        await client.enqueue_many_copy([Bench(body=json.dumps(BODY))] * some, queue="bench")
    count.begin()
    await client.start([("bench", 256)])
    await asyncio.wait_for(count.enough.wait(), count.until - count.begun + 10)
    await client.shutdown()


async def with_pgmq(url: str, count: Count) -> None:
    import psycopg
    from pgmq.install import install_pgmq_from_sql

    with psycopg.connect(url, autocommit=True) as conn:
        install_pgmq_from_sql(conn=conn)
    body = json.dumps(BODY)
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as reading,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as writing,
    ):
        await reading.execute("select pgmq.create('bench')")
        for start in range(0, count.items, 1000):
            some = min(1000, count.items - start)
            await reading.execute("select pgmq.send_batch('bench', %s::jsonb[])", ([body] * some,))
        taken: asyncio.Queue[list[int] | None] = asyncio.Queue(2)

        async def acknowledge() -> None:
            while (ids := await taken.get()) is not None:
                await writing.execute("select pgmq.archive('bench', %s::bigint[])", (ids,))
                count.add(len(ids))

        count.begin()
        acknowledging = asyncio.create_task(acknowledge())
        while time.perf_counter() < count.until:
            cursor = await reading.execute(
                "select msg_id, message from pgmq.read('bench', 300, 500)"
            )
            rows = await cursor.fetchall()
            if not rows:
                break
            await taken.put([row[0] for row in rows])
        await taken.put(None)
        await acknowledging


PEERS: dict[str, Callable[[str, Count], Awaitable[None]]] = {
    "pgqueuer": with_pgqueuer,
    "procrastinate": with_procrastinate,
    "awa": with_awa,
    "pgmq": with_pgmq,
}


async def _measure(name: str, url: str, items: int, seconds: float) -> None:
    count = Count(items, seconds)
    await PEERS[name](url, count)
    found = {"rate": count.rate, "done": count.done, "version": version(PACKAGES[name])}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    asyncio.run(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
