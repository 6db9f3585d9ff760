"""Do the thirty-one questions of docs/reporting.md answer in time, and does the engine go on beside them?

Method. An embedded Postgres (fsync on) is filled with ``--rows`` attempts by INSERT … SELECT from
generate_series: one workspace, four resources, batches of 100,000 items over ten days, a fiftieth of the calls
failed, prices known; items, requests, results, flows and rollups to match. Then VACUUM ANALYZE. Every question
of docs/reporting.md is asked ``--repeat`` times by a login that ``sluice report grant`` made, the median counts; a
question is at the rollup grain unless it reads items, attempts, failures or dead letters. Bounds: a second, and
five for details.

Then the engine: claims and settlements of 500 items in a loop, as workers make them but without a provider,
for ``--seconds`` while four clients repeat the slowest questions and one more holds a snapshot, and before and
after that alone. Each run works on batches of its own. The readers' backends give way to others as maintenance
makes them on an embedded server (``--equals``: they do not). Their clients, which would run on machines of their
own, get what processor time is left, too.

``--docs`` puts times and plans into docs/reporting.md.

    python -m bench reports --rows 10000000 --seconds 600 --docs
    python -m bench reports --quick
"""

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from app import connections, embedded, migrate, queue, reports, resources, tenants
from app.db import Database
from app.embedded import Embedded
from app.ids import uuid7
from app.queue import Outcome, Settlement
from app.secrets import Keyring
from bench._filling import fill

_DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "reporting.md"
_DETAILS = re.compile(r"report\.(items|attempts|failures|dead_letters)\b")
_BEGIN = "<!-- times: written by python -m bench reports --docs -->\n"
_END = "<!-- times: end -->\n"
_READER = "analyst"
_BATCH = 100_000
_DAYS = 10
_CLAIM = 500

#: The engine is measured without readers for so long at most, half of it before and half of it after.
_ALONE_S = 120.0
#: Of tables, indexes and the log before them; and how much there is of it at least.
_BYTES_PER_ROW = 1500
_LEAST_BYTES = 2 * 2**30

_FILL = (
    """
    select partitions_ensure(d::date)
    from generate_series(current_date - %(days)s::int, current_date + 1, interval '1 day') d
    """,
    """
    create table bench_batches as
    select n, %(items)s::int as items, gen_random_uuid() as batch_id, b.at, (b.at at time zone 'UTC')::date as day
    from generate_series(0, %(batches)s::int - 1) n
    cross join lateral (
        select now() - interval '1 hour' - (%(batches)s::int - 1 - n) * (%(days)s::int * interval '1 day' / %(batches)s::int) as at
    ) b
    """,
    """
    insert into batches (workspace_id, batch_id, environment_id, batch_day, type, status, name, total_items,
        estimated_input_tokens, created_at, started_at, completed_at)
    select %(workspace_id)s, batch_id, %(environment_id)s, day, 'async', 'completed', 'batch ' || n, %(items)s,
        %(items)s * 100, at, at + interval '1 second', at + interval '30 minutes'
    from bench_batches
    """,
    """
    insert into flows (workspace_id, batch_id, resource_id, batch_day, is_open, virtual_time, total, unstarted,
        pending, completed, failed, input_tokens, output_tokens, cost_nano, currency, created_at)
    select %(workspace_id)s, batch_id, (%(resource_ids)s::uuid[])[n %% 4 + 1], day, false, 0, %(items)s, 0, 0,
        %(items)s - %(items)s / 50, %(items)s / 50, %(items)s * 100, %(items)s * 50, %(items)s * 45000::bigint, 'USD', at
    from bench_batches
    """,
    """
    insert into rollup_due (batch_day, minute_at)
    select distinct b.day, date_trunc('minute', b.at, 'UTC') + m * interval '1 minute'
    from bench_batches b
    cross join generate_series(0, %(items)s * 18 / 60000 + 1) m
    """,
)
#: The four large tables, which are filled at the same time. Lateral: batch after batch, in the order of time, as
#: rows are really written. In another order BRIN finds nothing and the rows of a batch are on all pages of its day.
_FILL_LARGE = (
    """
    insert into items (workspace_id, batch_day, batch_id, resource_id, ended_at, seq, attempt, input_tokens, status,
        ended_reason, failures)
    select %(workspace_id)s, b.day, b.batch_id, (%(resource_ids)s::uuid[])[b.n %% 4 + 1],
        b.at + s * interval '18 milliseconds', s, 1, 100,
        case when s %% 50 = 0 then 'failed' else 'completed' end::work_status,
        case when s %% 50 = 0 then 'rejected' else 'answered' end::ended_reason, 0
    from bench_batches b
    cross join lateral generate_series(0, b.items - 1) s
    """,
    """
    insert into item_requests (workspace_id, batch_day, batch_id, seq, body)
    select %(workspace_id)s, b.day, b.batch_id, s, '{"messages":[]}'
    from bench_batches b
    cross join lateral generate_series(0, b.items - 1) s
    """,
    """
    insert into item_results (workspace_id, batch_day, batch_id, seq, attempt, ended_at, status_code, input_tokens,
        output_tokens, model, error_code, error_message, body)
    select %(workspace_id)s, b.day, b.batch_id, s, 1, b.at + s * interval '18 milliseconds',
        case when s %% 50 = 0 then 400 else 200 end, 100, 50, 'bench-model',
        case when s %% 50 = 0 then 'invalid_request' end, case when s %% 50 = 0 then 'no' end,
        case when s %% 50 <> 0 then '{}'::json end
    from bench_batches b
    cross join lateral generate_series(0, b.items - 1) s
    """,
    """
    insert into attempts (workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, connection_id,
        worker_id, claimed_at, started_at, ended_at, latency_ms, status_code, error_code, error_message, model,
        reserved_limits, reserved_input_tokens, reserved_output_tokens, charged_requests, charged_input_tokens,
        charged_output_tokens, cost_nano, currency)
    select %(workspace_id)s, b.day, b.batch_id, s, 1,
        case when s %% 50 = 0 then 'rejected' else 'answered' end::attempt_outcome,
        (%(resource_ids)s::uuid[])[b.n %% 4 + 1], %(connection_id)s, %(worker_id)s,
        b.at + (s - 50) * interval '18 milliseconds', b.at + (s - 50) * interval '18 milliseconds',
        b.at + s * interval '18 milliseconds', 200 + s %% 1000, case when s %% 50 = 0 then 400 else 200 end,
        case when s %% 50 = 0 then 'invalid_request' end, case when s %% 50 = 0 then 'no' end, 'bench-model',
        '{}', 100, 60, 1, 100, 50, 45000, 'USD'
    from bench_batches b
    cross join lateral generate_series(0, b.items - 1) s
    """,
)


def main() -> None:
    """Run it once; exit 1 unless every bound held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--equals", action="store_true", help="let no reader's backend give way")
    parser.add_argument("--plans", type=Path, help="write every question's plan to this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true", help="put the times into docs/reporting.md")
    parser.add_argument("--quick", action="store_true", help="200,000 rows, ten seconds")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.seconds, options.repeat = 200_000, 10.0, 1
    with tempfile.TemporaryDirectory(prefix="sluice-reports-") as place:
        Path(place).chmod(0o711)
        needed = max(options.rows * _BYTES_PER_ROW, _LEAST_BYTES)
        if shutil.disk_usage(place).free < needed:
            sys.exit(f"{place} has no {needed / 1e9:.0f} GB free; set TMPDIR to a place that has.")
        server = embedded.acquire(Path(place) / "home")
        try:
            migrate.migrate(server.url)
            good = asyncio.run(measure(server, options))
        finally:
            server.release()
    sys.exit(0 if good else 1)


async def measure(server: Embedded, options: argparse.Namespace) -> bool:
    """Fill, ask, and work beside the asking; whether every bound held."""
    async with Database(server.url, size=6) as db:
        tenant = await _tenant(db)
        clock = _Stages()
        await _fill(db, tenant, options.rows)
        clock.end(f"filled {options.rows:,} attempts")
        await _settle_down(db)
        clock.end("vacuumed and analyzed")
        minutes = await _roll_up(db)
        clock.end(f"rolled up {minutes:,} minutes")
        await _settle_down(db, like="rollup_%")
        size = await _value(db, "select pg_database_size(current_database())")
        print(f"{size / 1e9:.1f} GB", flush=True)
        async with db.transaction() as conn:
            await reports.grant(conn, user=_READER, allowed=reports.Allowance())
        reader = make_conninfo(server.url, user=_READER)
        asked = await _ask(reader, options)
        clock.end("asked all questions")
        slowest = sorted(asked, key=lambda each: -each["seconds"])[:4]
        # Before and after: what the machine's other work does to one is done to the other.
        short = min(options.seconds, _ALONE_S) / 2
        before = await _work(db, tenant, short)
        async with _readers(server, db, reader, [each["sql"] for each in slowest], options):
            beside = await _work(db, tenant, options.seconds)
        after = await _work(db, tenant, short)
    alone = {name: (before[name] + after[name]) / 2 for name in before}
    share = beside["rate"] / alone["rate"]
    engine = (
        f"engine alone: {alone['rate']:,.0f} items/s, claims {alone['claim_ms']:.1f} ms;"
        f" beside {options.clients} readers for {options.seconds:.0f} s: {beside['rate']:,.0f} items/s"
        f" ({share:.1%}), claims {beside['claim_ms']:.1f} ms, in the first and the last fifth"
        f" {beside['first_ms']:.1f} and {beside['last_ms']:.1f} ms"
    )
    print(engine)
    if options.json is not None:
        report = {"rows": options.rows, "questions": asked, "alone": alone, "beside": beside}
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    if options.plans is not None:
        plans = [f"-- {each['number']}. {each['question']}\n{each['plan']}\n" for each in asked]
        options.plans.write_text("\n".join(plans), encoding="utf-8")
    if options.docs:
        _publish(asked, slowest, f"{options.rows:,} attempts, {size / 1e9:.1f} GB; {engine}.")
    return all(each["seconds"] < each["bound"] for each in asked) and share >= 0.9


class _Stages:
    """Tells how long each stage took, when it ended."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def end(self, what: str) -> None:
        now = time.monotonic()
        print(f"{what} in {now - self._begun:.1f} s", flush=True)
        self._begun = now


async def _tenant(db: Database) -> dict[str, Any]:
    keyring = Keyring(Keyring.generate())
    async with db.transaction() as conn:
        made = await tenants.create_workspace(conn, name="bench", environment="bench")
        place: dict[str, Any] = {
            "workspace_id": made.workspace_id,
            "environment_id": made.environment_id,
        }
        connection_id = await connections.create(
            conn,
            keyring=keyring,
            **place,
            name="bench",
            provider="openai-compatible",
            base_url="http://127.0.0.1:9/v1",
            secret=None,
            timeout_ms=30_000,
        )
        resource_ids = [
            await resources.create(
                conn, **place, connection_id=connection_id, name=f"r{n}", model="bench-model"
            )
            for n in range(4)
        ]
        worker_id = uuid7()
        await queue.register_worker(
            conn, worker_id=worker_id, host="bench", machine="bench", pid=1, version="0"
        )
    return {
        **place,
        "connection_id": connection_id,
        "resource_ids": resource_ids,
        "worker_id": worker_id,
    }


async def _fill(db: Database, tenant: dict[str, Any], rows: int) -> None:
    items = min(_BATCH, rows)
    known = {**tenant, "days": _DAYS, "items": items, "batches": max(rows // items, 1)}

    async def run(statement: str) -> None:
        # Client-side binding: DDL takes no parameters.
        async with db.connection() as conn, psycopg.AsyncClientCursor(conn) as cursor:
            await cursor.execute(statement.encode(), known)

    # Autovacuum would read the tables while they grow, more than once.
    await run("alter system set autovacuum = off")
    await run("select pg_reload_conf()")
    for statement in _FILL:
        await run(statement)
    await asyncio.gather(*(run(statement) for statement in _FILL_LARGE))
    await run("drop table bench_batches")
    await run("alter system reset autovacuum")


async def _settle_down(db: Database, *, like: str = "%") -> None:
    """Leave nothing for a later stage to do that this one caused; of tables so named."""
    async with db.connection() as conn:
        found = await (
            await conn.execute(
                "select relname from pg_class where relnamespace = 'public'::regnamespace"
                " and relkind in ('r', 'p') and not relispartition and relname like %s",
                (like,),
            )
        ).fetchall()
        for (name,) in found:
            await conn.execute(sql.SQL("vacuum (analyze) {}").format(sql.Identifier(name)))
        await conn.execute("checkpoint")
        await conn.execute("select pg_reload_conf()")


async def _value(db: Database, query: LiteralString) -> Any:  # noqa: ANN401 - whatever it is
    async with db.connection() as conn:
        row = await (await conn.execute(query)).fetchone()
    assert row is not None
    return row[0]


async def _roll_up(db: Database) -> int:
    done = 0
    while True:
        async with db.transaction() as conn:
            row = await (await conn.execute("select rollup_some(50)")).fetchone()
        assert row is not None
        if not row[0]:
            return done
        done += row[0]


async def _ask(url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    found = re.findall(
        r"### (\d+)\. (.*?)\n\n```sql\n(.*?)```", _DOCUMENT.read_text("utf-8"), re.DOTALL
    )
    asked: list[dict[str, Any]] = []
    for number, question, text in found:
        bound = 5 if _DETAILS.search(text) else 1
        times: list[float] = []
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            for _ in range(options.repeat):
                begun = time.monotonic()
                await (await conn.execute(text.encode())).fetchall()
                times.append(time.monotonic() - begun)
            plan = await (
                await conn.execute(b"explain (analyze, buffers) " + text.encode())
            ).fetchall()
        seconds = statistics.median(times)
        asked.append(
            {
                "number": int(number),
                "question": question,
                "seconds": seconds,
                "bound": bound,
                "sql": text,
                "plan": "\n".join(row[0] for row in plan),
            }
        )
        flag = "" if seconds < bound else f"   over {bound} s"
        print(f"{number:>3}  {seconds:7.3f} s  {question}{flag}", flush=True)
    return asked


def _publish(asked: list[dict[str, Any]], slowest: list[dict[str, Any]], head: str) -> None:
    """Put a table of the times, and the plans of the slowest, between the marks of the document."""
    lines = [head[0].upper() + head[1:], "", "| question | seconds | bound |", "|---|---|---|"]
    lines += [
        f"| {each['number']}. {each['question']} | {each['seconds']:.3f} | {each['bound']} |"
        for each in asked
    ]
    for each in slowest:
        lines += ["", f"<details><summary>Plan of question {each['number']}</summary>", "", "```"]
        lines += [*_slim(each["plan"]), "```", "", "</details>"]
    text = _DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    _DOCUMENT.write_text(before + _BEGIN + "\n".join(lines) + "\n" + _END + after, "utf-8")


def _slim(plan: str) -> list[str]:
    """A plan without the branches that were never run, which are those of other days, and without buffers."""
    kept: list[str] = []
    skipped_at: int | None = None
    for line in plan.splitlines():
        depth = len(line) - len(line.lstrip())
        if skipped_at is not None and depth > skipped_at:
            continue
        skipped_at = depth if "(never executed)" in line else None
        if skipped_at is None and not re.match(r" *(Buffers|Index Searches|Planning):", line):
            kept.append(re.sub(r"\(cost=.*?\) ", "", line))
    return kept


async def _work(db: Database, tenant: dict[str, Any], seconds: float) -> dict[str, float]:
    """Claim and settle for so long; items per second, and how long claims took."""
    claims: list[float] = []
    done = 0
    await _submit(db, tenant)
    begun = time.monotonic()
    spent = 0.0
    while spent < seconds:
        before = time.monotonic()
        async with db.transaction() as conn:
            claim = await queue.claim(
                conn,
                workspace_id=tenant["workspace_id"],
                resource_id=tenant["resource_ids"][0],
                worker_id=tenant["worker_id"],
                want=_CLAIM,
                alone=True,
                guard_s=1,
                grace_s=60,
                burst_s=60,
                slow_start=0,
            )
        claims.append((time.monotonic() - before) * 1000)
        if not claim.items:
            claims.pop()
            spent += time.monotonic() - before
            paused = time.monotonic()
            await _submit(db, tenant)
            begun += time.monotonic() - paused
            continue
        async with db.transaction() as conn:
            await queue.settle(
                conn,
                workspace_id=tenant["workspace_id"],
                worker_id=tenant["worker_id"],
                observed=(),
                rest_s=1,
                rest_most_s=60,
                settlements=[
                    Settlement(
                        batch_day=item.batch_day,
                        batch_id=item.batch_id,
                        resource_id=item.resource_id,
                        connection_id=tenant["connection_id"],
                        seq=item.seq,
                        attempt=item.attempt,
                        outcome=Outcome.answered,
                        claimed_at=item.claimed_at,
                        limit_ids=item.limit_ids,
                        reserved_input_tokens=item.input_tokens,
                        reserved_output_tokens=item.output_tokens,
                        expected_output_tokens=item.expected_output_tokens,
                        refund=False,
                        status_code=200,
                        input_tokens=10,
                        output_tokens=20,
                    )
                    for item in claim.items
                ],
                bodies=["{}" for _ in claim.items],
            )
        done += len(claim.items)
        spent += time.monotonic() - before
    fifth = max(len(claims) // 5, 1)
    return {
        "rate": done / spent,
        "claim_ms": statistics.median(claims),
        "first_ms": statistics.median(claims[:fifth]),
        "last_ms": statistics.median(claims[-fifth:]),
    }


async def _submit(db: Database, tenant: dict[str, Any]) -> None:
    ids = {name: tenant[name] for name in ("workspace_id", "environment_id")}
    async with db.connection() as conn:
        await fill(conn, ids, tenant["resource_ids"][0], number=1, items=50_000)


_CLIENT = """
import os, sys, psycopg
os.nice(19)
with psycopg.connect(sys.argv[1], autocommit=True) as conn:
    while True:
        for text in sys.argv[2:]:
            conn.execute(text).fetchall()
"""


@asynccontextmanager
async def _readers(
    server: Embedded, db: Database, reader: str, texts: list[str], options: argparse.Namespace
) -> AsyncGenerator[None]:
    """Meanwhile clients repeat these questions, and one more holds a snapshot."""
    clients = [
        subprocess.Popen(  # noqa: ASYNC220 - before anything is measured
            [sys.executable, "-c", _CLIENT, reader, *texts], start_new_session=True
        )
        for _ in range(options.clients)
    ]
    giving_way: asyncio.Task[None] | None = None
    try:
        for client in clients:
            _make_nice(client.pid)
        if not options.equals:
            giving_way = asyncio.create_task(_give_way(server, db))
        async with db.transaction() as holder:
            await holder.execute("set transaction isolation level repeatable read")
            await holder.execute("select count(*) from workspaces")
            yield
    finally:
        if giving_way is not None:
            giving_way.cancel()
        for client in clients:
            client.kill()
            client.wait()


def _make_nice(pid: int) -> None:
    """Where the processor is shared among sessions first, the session must be nice, too."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("19")


async def _give_way(server: Embedded, db: Database) -> None:
    """As maintenance does."""
    while True:
        async with db.connection() as conn:
            server.give_way(await reports.readers(conn))
        await asyncio.sleep(1)


if __name__ == "__main__":
    main()
