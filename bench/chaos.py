"""Chaos: workers and Postgres are killed with SIGKILL while a rate-limited batch runs.

Method. A Postgres (embedded, fsync on), a simulator that enforces a sliding limit, and N worker
processes (``sluice worker``), all on this machine. A batch of questions (``--file`` with a column
``text``, else generated ones, each different) runs under the same limit. Every few seconds one worker,
chosen at random, gets SIGKILL and is started again; once, the postmaster gets SIGKILL and whichever
process notices first starts it again. The simulator is the judge of calls, the database of records.

It reports, and fails unless: every row answered and recorded once; no call over the limit; no body
called again beyond what was in flight at a kill (attempts marked lost); counters equal a recount;
the ledger equals the recount of its attempts; no deadlock.

    python -m bench.chaos --quick
    python -m bench.chaos --file questions.csv --rpm 1000
"""

import argparse
import asyncio
import csv
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.capacity import Amount
from app.db import CONNECTION_ERRORS
from app.inputs import json_body
from app.intake import NewBatch
from bench._rig import Rig


def arguments() -> argparse.ArgumentParser:
    """What the command line may say; a test takes the defaults from here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--file", type=Path, help="CSV with a column text")
    parser.add_argument(
        "--items", type=int, default=3000, help="generated questions, without --file"
    )
    parser.add_argument("--rpm", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=20, help="calls in flight per worker")
    parser.add_argument("--latency-ms", type=float, default=1000)
    parser.add_argument("--kill-every", type=float, default=4.0, help="seconds between kills")
    parser.add_argument("--kills", type=int, default=10_000, help="kills at most; 0: none at all")
    parser.add_argument("--postgres-kill-at", type=float, default=45.0, help="seconds; 0: never")
    parser.add_argument("--dead-after", type=float, default=20.0, help="SLUICE_DEAD_AFTER_S")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="600 items at 600 per minute, under a minute"
    )
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    """Run it once; exit 1 unless all that is promised held."""
    options = arguments().parse_args()
    if options.quick:
        options.items, options.rpm, options.postgres_kill_at = 600, 600, 10.0
        options.kill_every = 2.0
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-") as home:
        failed = asyncio.run(Chaos(options, Path(home)).run())
    sys.exit(1 if failed else 0)


class Chaos:
    """One run of a batch while things are killed."""

    def __init__(self, options: argparse.Namespace, home: Path) -> None:
        self.options = options
        self.home = home
        self.random = random.Random(options.seed)  # noqa: S311 - reproducible mischief
        self.kills = 0

    async def run(self) -> bool:
        options = self.options
        texts = self.texts()
        opening = Rig.open(
            self.home,
            simulate={"rpm": options.rpm, "latency_ms": options.latency_ms},
            variables={
                "SLUICE_CONCURRENCY": str(options.concurrency),
                "SLUICE_DEAD_AFTER_S": str(options.dead_after),
                "SLUICE_HEARTBEAT_S": str(options.dead_after / 4),
            },
        )
        async with opening as rig:
            amounts = [Amount(period="minute", requests=options.rpm, tokens=None)]
            resource_id = await rig.create_resource("simulated", amounts)
            bodies = [
                json_body({"messages": [{"role": "user", "content": text}]}) for text in texts
            ]
            batch = await rig.submit(resource_id, bodies)
            rig.workers = [rig.start_worker() for _ in range(options.workers)]
            took_s = await self.watch(rig, batch)
            report = await rig.report()
            await rig.stop_workers()
            return not await self.is_good(rig, report, len(texts), took_s)

    def texts(self) -> list[str]:
        if self.options.file is None:
            return [f"Question {n}: where is my card?" for n in range(self.options.items)]
        with self.options.file.open(newline="", encoding="utf-8") as file:
            return [row["text"] for row in csv.DictReader(file)]

    async def watch(self, rig: Rig, batch: NewBatch) -> float:
        """Kill and restart until the batch has ended; how long it took."""
        begun = time.monotonic()
        next_kill = begun + self.options.kill_every
        postgres_due = self.options.postgres_kill_at
        deadline = begun + 1200
        while time.monotonic() < deadline:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            if self.kills < self.options.kills and now >= next_kill:
                next_kill = now + self.options.kill_every * self.random.uniform(0.7, 1.3)
                victim = self.random.randrange(len(rig.workers))
                rig.workers[victim].kill()
                rig.workers[victim].wait()
                rig.workers[victim] = rig.start_worker()
                self.kills += 1
            if self.options.kills and postgres_due and now - begun > postgres_due:
                postgres_due = 0
                rig.kill_postgres()
            try:
                found = await rig.batch(batch)
            except CONNECTION_ERRORS:
                continue
            if int(now - begun) % 15 == 0 and (now - begun) % 1 < 0.3:
                print(
                    f"{now - begun:6.1f} s  done {found.ended}/{found.total_items}  "
                    f"running {found.running}  kills {self.kills}",
                    flush=True,
                )
            if found.is_finished:
                return now - begun
        raise RuntimeError("the batch did not end within 20 minutes")

    async def is_good(self, rig: Rig, report: dict[str, Any], items: int, took_s: float) -> bool:
        """Print the figures; whether all that is promised held."""
        async with rig.db.connection() as conn:
            row = await (
                await conn.execute(
                    """
                    select (select count(*) from items where status = 'completed'),
                        (select count(*) from item_results),
                        (select count(*) from attempts where outcome = 'answered'),
                        (select count(*) from attempts where outcome = 'lost'),
                        (select sum(deadlocks) from pg_stat_database)
                    """
                )
            ).fetchone()
        assert row is not None
        completed, results, answered, lost, deadlocks = (int(n or 0) for n in row)
        log = rig.server.log_file.read_text(errors="replace")
        seconds: list[int] = report["accepted_per_second"]
        first = next((n for n, calls in enumerate(seconds) if calls), 0)
        share = sum(seconds[first + 60 : first + 180]) / (2 * self.options.rpm)
        figures = {
            "items": items,
            "took_s": round(took_s, 1),
            "worker_kills": self.kills,
            "completed": completed,
            "results": results,
            "answers_recorded": answered,
            "attempts_lost": lost,
            "calls_accepted": report["accepted"],
            "calls_over_limit": report["over_limit"],
            "calls_refused": report["refused"],
            "peak_calls_60s": report["peak_calls_60s"],
            "bodies_called_twice": report["called_twice"],
            "bodies_answered_twice": report["answered_twice"],
            "share_of_limit_s60_180": round(share, 4),
            "deadlocks": deadlocks + log.count("deadlock detected"),
            "doctor": await rig.findings(),
        }
        for name, value in figures.items():
            print(f"{name:26} {value}")
        if self.options.json:
            self.options.json.write_text(json.dumps(figures, indent=2))
        return (
            completed == results == items
            and report["over_limit"] == 0
            and report["refused"] == 0
            and report["called_twice"] <= lost
            and figures["deadlocks"] == 0
            and not figures["doctor"]
        )


if __name__ == "__main__":
    main()
