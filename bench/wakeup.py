"""How long after a new batch is committed does its first provider call arrive, on an idle system?

Method
------
One worker process, idle, its connections warm. A batch of one item is committed and the doorbell rung as the API
does; the provider, in the benchmark's own process, notes when the request arrives. Both times are of one
clock. The next batch follows when the last one has ended and half a second later.
"""

import asyncio
import time

from bench import _figures
from bench._figures import Figure, Part, Run, centile
from bench._rig import Rig
from bench.http_clients import ANSWER, REQUEST

LIMIT_S = 120.0


class _Provider(asyncio.Protocol):
    """Answers at once and notes when each request came."""

    arrived: "asyncio.Queue[float]"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        # A request of this size comes in one piece on loopback, or its head does first.
        if data.startswith(b"POST"):
            self.arrived.put_nowait(time.perf_counter())
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(ANSWER), ANSWER)
            )


async def measure(run: Run) -> Part:
    """One batch after the other."""
    part = Part()
    _Provider.arrived = asyncio.Queue()
    server = await asyncio.get_running_loop().create_server(_Provider, "127.0.0.1", 0)
    took: list[float] = []
    async with (
        server,
        Rig.open(run.home, database="wakeup", worker_log=run.home / "workers.log") as rig,
    ):
        rig.provider = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        resource_id = await rig.create_resource("wakeup")
        await rig.start_workers(1)
        for turn in range(run.size(100, 20) + 3):
            batch = await rig.submit(resource_id, [REQUEST])
            at = await asyncio.wait_for(_Provider.arrived.get(), 30)
            if turn >= 3:
                took.append((at - rig.committed_at) * 1000)
            while not (await rig.batch(batch)).is_finished:  # noqa: ASYNC110 - a row of another process
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5 if not run.quick else 0.05)
        await rig.stop_workers()
    part.figures.append(
        Figure(
            what="commit of a new batch to its first call, idle, p50",
            unit="ms",
            ours=centile(took, 50),
            target="< 20",
            met=centile(took, 50) < 20,
            limits={"p99": centile(took, 99)},
        )
    )
    return part


def main() -> None:
    """Alone."""
    _figures.run("wakeup", measure)
