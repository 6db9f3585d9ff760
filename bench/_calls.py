"""The whole path: worker processes call a provider over HTTP, and what each side spends on it.

The provider is `bench.http_clients`'s server, which answers every call after the same time and says how much
CPU it used; the workers are the command ``sluice worker``.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from app.intake import NewBatch
from bench import http_clients
from bench._queueing import AMPLE
from bench._rig import Rig
from bench.http_clients import REQUEST

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
#: The most that a run may take per item, with the machine's worst day in it.
_MOST_S_PER_ITEM = 0.02


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far; 0 when it is gone."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(values[11]) + int(values[12])) / _TICKS


def rss_mib(pid: int) -> float:
    """Memory that a process holds at present."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_MIB


def postgres_cpu_s(rig: Rig) -> float:
    """CPU seconds of the server and those of its processes that live."""
    postmaster = int((rig.server.data_dir / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children")
    return sum(cpu_s(int(pid)) for pid in (postmaster, *children.read_text().split()))


@contextmanager
def provider(rig: Rig, *, latency_ms: float) -> Generator[int]:
    """A provider, to which connections made meanwhile go; its port."""
    with http_clients.start("--serve", "--latency-ms", str(latency_ms)) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        rig.provider = f"http://127.0.0.1:{port}"
        try:
            yield port
        finally:
            server.kill()


@dataclass(slots=True, kw_only=True)
class Through:
    """What a run was like. CPU in percent of one core; ``memory``: (seconds, MiB) of the first worker."""

    calls_per_s: float
    provider_cpu: float
    workers_cpu: float
    postgres_cpu: float
    waits: Counter[str]
    memory: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])


async def through(
    rig: Rig, *, port: int, items: int, workers: int, name: str, batches: int = 4
) -> Through:
    """So many calls from start to end with so many workers, which end with it.

    The rate is that of the middle eight tenths, so that neither the start of processes nor the last calls count.
    """
    connection_id = await rig.create_connection(name, AMPLE)
    resource_id = await rig.create_resource(name, AMPLE, connection_id=connection_id)
    made = [await rig.submit(resource_id, [REQUEST] * (items // batches)) for _ in range(batches)]
    rig.workers = []
    before = (http_clients.server_cpu_s(port), postgres_cpu_s(rig))
    begun = time.monotonic()
    await rig.start_workers(workers)
    waits: Counter[str] = Counter()
    memory: list[tuple[float, float]] = []
    until = time.monotonic() + 30 + items * _MOST_S_PER_ITEM
    while not await _are_done(rig, made):
        if time.monotonic() > until:
            raise TimeoutError(f"{name}: not done within {until - begun:.0f} s")
        memory.append((time.monotonic() - begun, rss_mib(rig.workers[0].pid)))
        waits.update(await _waits(rig))
        await asyncio.sleep(0.1)
    took = time.monotonic() - begun
    worker_cpu = sum(cpu_s(worker.pid) for worker in rig.workers)
    after = (http_clients.server_cpu_s(port), postgres_cpu_s(rig))
    await rig.stop_workers()
    return Through(
        calls_per_s=await _rate(rig, resource_id),
        provider_cpu=100 * (after[0] - before[0]) / took,
        workers_cpu=100 * worker_cpu / took,
        postgres_cpu=100 * (after[1] - before[1]) / took,
        waits=waits,
        memory=memory,
    )


async def _are_done(rig: Rig, made: list[NewBatch]) -> bool:
    return all([(await rig.batch(batch)).is_finished for batch in made])


async def _rate(rig: Rig, resource_id: UUID) -> float:
    """Calls per second between the first tenth of the answers and the last."""
    async with rig.db.connection() as conn:
        row = await (
            await conn.execute(
                """
                select 0.8 * count(*) / extract(epoch from
                    percentile_disc(0.9) within group (order by ended_at)
                    - percentile_disc(0.1) within group (order by ended_at))
                from attempts where resource_id = %s
                """,
                (resource_id,),
            )
        ).fetchone()
    assert row is not None
    return float(row[0])


async def _waits(rig: Rig) -> list[str]:
    """What the workers' sessions are doing: waiting for what, or running."""
    async with rig.db.connection() as conn:
        rows = await (
            await conn.execute(
                "select coalesce(wait_event_type || ':' || wait_event, 'running') from pg_stat_activity"
                " where datname = current_database() and state = 'active' and pid <> pg_backend_pid()"
            )
        ).fetchall()
    return [row[0] for row in rows]


def busiest(waits: Counter[str]) -> str:
    """The most frequent ones in words."""
    total = sum(waits.values()) or 1
    return ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in waits.most_common(4))
