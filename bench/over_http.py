"""How many calls per second does one worker process make, with 1,000 in flight against 200 ms?

Method
------
The whole path: a worker process claims, calls a provider on loopback that answers 200 ms after the request
is complete, and records. The provider is a process of its own; its CPU is shown, so that it is seen
not to bind. The bare client is the worker's own HTTP client with 1,000 tasks that make the same call and do
nothing with the answer (`bench.http_clients`), against the same server; 5,000/s is the ceiling for all.
"""

import statistics

from bench import _calls, _figures, http_clients
from bench._figures import Figure, Part, Run
from bench._rig import Rig

LIMIT_S = 180.0
LATENCY_MS = 200


async def measure(run: Run) -> Part:
    """The worker and the bare client, in turns."""
    part = Part()
    items, in_flight = run.size(40_000, 2_000), run.size(1_000, 200)
    workload = http_clients.Workload(
        calls=run.size(20_000, 2_000), in_flight=in_flight, latency_ms=LATENCY_MS, rounds=1
    )
    variables = {"SLUICE_CONCURRENCY": str(in_flight), "SLUICE_SLOW_START": "0"}
    ours: list[_calls.Through] = []
    bare: list[http_clients.Measured] = []
    async with Rig.open(
        run.home, database="over_http", variables=variables, worker_log=run.home / "workers.log"
    ) as rig:
        with _calls.provider(rig, latency_ms=LATENCY_MS) as port:
            for turn in range(run.size(3, 1)):
                ours.append(
                    await _calls.through(rig, port=port, items=items, workers=1, name=f"{turn}")
                )
                bare.append(http_clients.measure_in_child("sluice", workload, port=port))
    rate = statistics.median(one.calls_per_s for one in ours)
    limit = statistics.median(one.calls_per_s for one in bare)
    last = ours[-1]
    part.figures.append(
        Figure(
            what=f"whole path, {in_flight:,} in flight, {LATENCY_MS} ms, one worker",
            unit="calls/s",
            ours=rate,
            target="≥ 60 % of the bare client",
            met=rate >= 0.6 * limit,
            limits={"bare client": limit, "no client": 1000 / LATENCY_MS * in_flight},
            note=f"over_http: CPU of the provider {last.provider_cpu:.0f} %, of the worker"
            f" {last.workers_cpu:.0f} %, of Postgres {last.postgres_cpu:.0f} % of a core;"
            f" beside the bare client the provider used {bare[-1].server_cpu_percent:.0f} %;"
            f" Postgres was {_calls.busiest(last.waits)}",
        )
    )
    return part


def main() -> None:
    """Alone."""
    _figures.run("over_http", measure)
