"""How many items per second does the engine take from claimed to recorded?

Method
------
One tenant, one resource with limits on it and on its connection that are counted and never bind, and
batches made beforehand. A process claims 500 items at a time on one connection and records, on another
one, an answer for each that it makes up; ledger, flows, counters, events, attempts and results are all
written, each claim and each settlement commits (fsync on). The clock runs from the first claim to the
last commit. Requests have about 600 bytes, answers 500.

Beside it, driven alike by the same loop on the same server:

* two UPDATEs: a table of numbers and states; one statement takes 500, another one marks them as done.
  Once with nothing else in the row, once with the request in it, which the first statement returns. No
  answer is kept.
* same rows: what we write of a batch's items (state, attempt, answer, event) but no ledger, no flows,
  no limits, no order between batches, no fencing.
* peers, each in its fastest documented way with a handler that does nothing (bench/_peers.py). pgqueuer,
  procrastinate and awa keep no answers, pgmq archives its messages.

Rounds are interleaved and the median counts.
"""

import json
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

from bench import _figures
from bench._figures import Figure, Part, Run
from bench._queueing import Bare, Engine, PlainRows, drive
from bench._rig import Rig, drop, made_anew
from bench.http_clients import REQUEST

LIMIT_S = 420.0
BATCHES = 4
SIZES = (10, 50, 100, 250, 500, 1000)
#: Items per second that a peer may be expected to exceed; it is given ten seconds' worth, at most.
_PEERS = {"pgqueuer": 20_000, "procrastinate": 1_500, "awa": 20_000, "pgmq": 30_000}
_PEER_S = 25.0


async def engine_rate(
    rig: Rig, name: str, items: int, *, want: int = 500, flows: int = BATCHES
) -> float:
    """Items per second of new batches."""
    engine = await Engine.make(rig, name=name, want=want)
    for _ in range(flows):
        await rig.submit(engine.resource_id, [REQUEST] * (items // flows))
    done = await drive(rig.db.url, engine.claim, engine.record)
    assert done.items == items // flows * flows - want
    return done.rate


async def _bare_rate(rig: Rig, items: int, *, body: bytes | None) -> float:
    bare = await Bare.fill(rig, items, body=body)
    return (await drive(rig.db.url, bare.claim, bare.record)).rate


async def _plain_rate(rig: Rig, name: str, items: int) -> float:
    engine = await Engine.make(rig, name=name)
    batch = await rig.submit(engine.resource_id, [REQUEST] * items)
    async with rig.db.connection() as conn:
        # Unlike the verbs it is planned by statistics: a first plan without them costs it a second.
        await conn.execute("analyze")
    plain = PlainRows(batch=batch, engine=engine)
    return (await drive(rig.db.url, plain.claim, plain.record)).rate


def peer_rate(rig: Rig, python: Path, name: str, items: int) -> tuple[float, str]:
    """Items per second of a peer on a database of its own, and its version."""
    url = made_anew(rig.server.url, f"peer_{name}")
    command = [python, Path(__file__).with_name("_peers.py"), name, url, str(items), str(_PEER_S)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=4 * _PEER_S, check=False, cwd=rig.home
    )
    drop(rig.server.url, f"peer_{name}")
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr[-300:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return float(found["rate"]), str(found["version"])


async def measure(run: Run) -> Part:
    """Interleave all of them."""
    part = Part()
    rates: dict[str, list[float]] = defaultdict(list)
    versions: dict[str, str] = {}
    items = run.size(40_000, 2_000)
    async with Rig.open(run.home, database="engine", pool=4) as rig:
        for turn in range(run.size(3, 1)):
            rates["ours"].append(await engine_rate(rig, f"ours {turn}", items))
            rates["two UPDATEs"].append(await _bare_rate(rig, 2 * items, body=None))
            rates["two UPDATEs with the request"].append(
                await _bare_rate(rig, 2 * items, body=REQUEST)
            )
            rates["same rows"].append(await _plain_rate(rig, f"plain {turn}", items))
            for name, most in _PEERS.items() if run.peers else ():
                assert run.peers is not None
                try:
                    rate, versions[name] = peer_rate(
                        rig, run.peers, name, run.size(most, most // 20)
                    )
                    rates[name].append(rate)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    part.notes.append(f"{name} was left out: {error}")
        by_size = [
            (float(want), await engine_rate(rig, f"by {want}", run.size(40, 4) * want, want=want))
            for want in (SIZES if not run.quick else SIZES[1::3])
        ]
        by_flows = [
            (
                float(flows),
                await engine_rate(rig, f"of {flows}", run.size(20_000, 2_000), flows=flows),
            )
            for flows in (1, 4, 16, 64, 256)[: run.size(5, 2)]
        ]
    median = {name: statistics.median(values) for name, values in rates.items()}
    peers = {name: median[name] for name in _PEERS if name in median}
    limits = {n: median[n] for n in ("two UPDATEs", "two UPDATEs with the request", "same rows")}
    ours = median["ours"]
    share = ours / median["two UPDATEs"]
    part.figures += [
        Figure(
            what="engine alone, 500 items per claim",
            unit="items/s",
            ours=ours,
            target="above every peer",
            met=ours > max(peers.values()) if peers else None,
            peers=peers,
            limits=limits,
            note="engine: peers " + ", ".join(f"{n} {v}" for n, v in versions.items()),
        ),
        Figure(
            what="engine alone, share of two bare UPDATEs",
            unit="%",
            ours=100 * share,
            target="≥ 40 %",
            met=share >= 0.4,
            limits={"with the request": 100 * ours / median["two UPDATEs with the request"]},
        ),
    ]
    part.curves["engine: items per second by items per claim"] = {"ours": by_size}
    part.curves["engine: items per second by batches at once"] = {"ours": by_flows}
    return part


def main() -> None:
    """Alone."""
    _figures.run("engine", measure)
