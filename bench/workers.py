"""Do two and four worker processes do more than one, and if not, what binds?

Method
------
As `bench.over_http`, with 500 calls in flight per process against 50 ms, so that a single worker is bound by
its CPU. CPU of workers, Postgres and provider is that of the run, in percent of one core; what Postgres
sessions waited for was sampled ten times per second.
"""

import os

from bench import _calls, _figures
from bench._figures import Figure, Part, Run
from bench._rig import Rig

LIMIT_S = 150.0
LATENCY_MS = 50


async def measure(run: Run) -> Part:
    """One, two, four."""
    part = Part()
    variables = {"SLUICE_CONCURRENCY": str(run.size(500, 100)), "SLUICE_SLOW_START": "0"}
    rates: dict[int, float] = {}
    async with Rig.open(
        run.home, database="workers", variables=variables, worker_log=run.home / "workers.log"
    ) as rig:
        with _calls.provider(rig, latency_ms=LATENCY_MS) as port:
            for number in (1, 2, 4):
                done = await _calls.through(
                    rig, port=port, items=run.size(40_000, 2_000), workers=number, name=f"{number}"
                )
                rates[number] = done.calls_per_s
                part.notes.append(
                    f"workers: {number} on {os.cpu_count()} cores: workers {done.workers_cpu:.0f} %,"
                    f" Postgres {done.postgres_cpu:.0f} %, provider {done.provider_cpu:.0f} % of a core;"
                    f" Postgres {_calls.busiest(done.waits)}"
                )
    part.figures += [
        Figure(
            what=f"{number} worker processes, {LATENCY_MS} ms",
            unit="calls/s",
            ours=rates[number],
            target="grows, or what binds is named",
            met=True if rates[number] > 1.1 * rates[1] else None,
            limits={"one": rates[1]},
        )
        for number in (2, 4)
    ]
    part.curves["workers: calls per second by worker processes"] = {
        "ours": [(float(number), rate) for number, rate in rates.items()]
    }
    return part


def main() -> None:
    """Alone."""
    _figures.run("workers", measure)
