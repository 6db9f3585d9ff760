"""The whole machine with real processes: workers and Postgres killed with SIGKILL in the middle.

The benchmark ``bench.chaos`` in small; it is the judge here too: every row answered and recorded once,
no call over the limit, nothing called again beyond what was in flight at a kill, counters and ledger
equal to a recount, no deadlock.
"""

import shlex
from pathlib import Path

from bench.chaos import Chaos, arguments


async def test_killing_workers_and_postgres_loses_and_doubles_nothing(tmp_path: Path) -> None:
    line = (
        "--items 120 --rpm 100000 --concurrency 5 --latency-ms 400 --workers 2 "
        "--kills 3 --kill-every 2.5 --postgres-kill-at 4 --dead-after 2"
    )
    chaos = Chaos(arguments().parse_args(shlex.split(line)), tmp_path)
    failed = await chaos.run()
    assert chaos.kills == 3
    assert not failed
