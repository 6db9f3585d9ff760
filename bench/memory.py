"""How much memory do a busy worker and a streaming API take, and does it grow?

Method
------
Resident memory of the process, read ten times per second. Worker: 1,000 calls in flight against 200 ms for as
many items as make its memory's course visible; the mean of the second fifth of the run is compared with that
of the last. API: a request of 200 MB streams in, then half as much three times; its peak, and what it holds
after the last against after the first.
"""

import asyncio
import statistics
import threading

from bench import _calls, _figures
from bench._api import key_of, serving
from bench._figures import Figure, Part, Run
from bench._rig import Rig
from bench.ingest import body, created

LIMIT_S = 270.0


class _Watch(threading.Thread):
    """Samples a process's memory until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self.ended = threading.Event()
        self._pid = pid

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.samples.append(_calls.rss_mib(self._pid))


async def _worker(run: Run, part: Part) -> None:
    variables = {"SLUICE_CONCURRENCY": str(run.size(1_000, 200)), "SLUICE_SLOW_START": "0"}
    async with Rig.open(
        run.home, database="memory", variables=variables, worker_log=run.home / "workers.log"
    ) as rig:
        with _calls.provider(rig, latency_ms=200) as port:
            done = await _calls.through(
                rig, port=port, items=run.size(150_000, 3_000), workers=1, name="memory"
            )
    samples = [mib for _, mib in done.memory]
    fifth = max(len(samples) // 5, 1)
    early = statistics.fmean(samples[fifth : 2 * fifth] or samples)
    late = statistics.fmean(samples[-fifth:])
    part.figures += [
        Figure(
            what=f"worker with {run.size(1_000, 200):,} in flight, peak",
            unit="MiB",
            ours=max(samples),
            target="< 200",
            met=max(samples) < 200,
        ),
        Figure(
            what="worker, end of the run against its second fifth",
            unit="times",
            ours=late / early,
            target="no growth",
            met=late <= 1.05 * early,
        ),
    ]
    part.curves["memory: MiB of a worker by seconds"] = {"worker": done.memory}


async def _api(run: Run, part: Part) -> None:
    megabytes = run.size(200, 10)
    text = b'{"messages":[{"role":"user","content":"%b"}]}' % (b"word " * 400)
    variables = {"SLUICE_MAX_BODY_BYTES": str(2 * megabytes * 2**20)}
    async with Rig.open(run.home, database="memory_api", variables=variables, pool=2) as rig:
        resource_id = await rig.create_resource("memory")
        with serving(rig, await key_of(rig)) as api:
            watch = _Watch(api.process.pid)
            watch.start()
            held: list[float] = []
            for share in (1.0, 0.5, 0.5, 0.5):
                number = int(megabytes * share * 1_000_000 / (len(text) + 80))
                pieces = body(resource_id, [text] * number)
                await asyncio.to_thread(created, api, pieces)
                held.append(_calls.rss_mib(api.process.pid))
            watch.ended.set()
            watch.join()
    part.figures += [
        Figure(
            what=f"API while {megabytes} MB stream in, peak",
            unit="MiB",
            ours=max(watch.samples),
            target="< 300",
            met=max(watch.samples) < 300,
        ),
        Figure(
            what="API after the fourth large request against after the first",
            unit="times",
            ours=held[-1] / held[0],
            target="no growth",
            met=held[-1] <= 1.05 * held[0],
        ),
    ]


async def measure(run: Run) -> Part:
    """The worker, then the API."""
    part = Part()
    await _worker(run, part)
    await _api(run, part)
    return part


def main() -> None:
    """Alone."""
    _figures.run("memory", measure)
