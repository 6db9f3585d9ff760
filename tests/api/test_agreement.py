"""Do views, API, command line and provider tell the same story of a run in which workers were killed?

Real worker processes call a simulator that fails, cuts, garbles and throttles, and are killed with SIGKILL while
calls are in flight. The simulator witnesses every call by the id that it gives it. Then:

    accepted by the provider = attempts - lost attempts + calls of lost attempts that had reached it

A call that reached it is recorded under its own id with its own end and tokens; of the others each belongs to an
item with as many lost attempts at least. All figures that anybody shows are sums over those records.
"""

import asyncio
import csv
import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from app import connections, prices, reports, resources
from app.db import Database
from app.secrets import Keyring
from app.settings import PREFIX, Settings
from app.simulator import Behaviour, Simulator, Witnessed
from tests.api.conftest import Json, Service, server_on, service_on
from tests.cli.conftest import say_migrated
from tests.test_prices import price

ITEMS = 160
KILLS = 3
#: What an attempt says of a call that ended so.
OUTCOMES = {
    None: "answered",
    "error": "unreachable",
    "cut": "unreachable",
    "garbage": "unreachable",
    "throttle": "throttled",
}
#: Billionths of a dollar per token of input and output.
INPUT_NANO, OUTPUT_NANO = 150, 600


class Run:
    """A service, a provider with a witness, and worker processes."""

    def __init__(self, service: Service, folder: Path, key: str) -> None:
        self.service = service
        self.witness: dict[str, Witnessed] = {}
        # A refusal lets the model rest for a second or more: few of them.
        behaviour = Behaviour(
            port=0,
            seed=1,
            latency_ms=150,
            send_headers=False,
            error_rate=0.1,
            cut_rate=0.05,
            garbage_rate=0.05,
            throttle_rate=0.015,
        )
        self.provider = Simulator(behaviour, witness=self.witness)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.log = folder / "workers.log"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        self.environment = kept | {
            "SLUICE_HOME": str(folder),
            "SLUICE_DATABASE_URL": service.db.url,
            "SLUICE_SECRET_KEY": key,
            "SLUICE_PROVIDER_ALLOW_NETWORKS": "127.0.0.0/8",
            "SLUICE_CONCURRENCY": "12",
            "SLUICE_HEARTBEAT_S": "0.25",
            "SLUICE_BACKOFF_BASE_S": "0.05",
            "SLUICE_BACKOFF_CAP_S": "0.2",
        }

    def start_worker(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "app.cli", "worker"], env=self.environment, stderr=log
            )

    async def rows(self, query: str, *params: object) -> list[tuple[Any, ...]]:
        async with self.service.db.connection() as conn:
            return await (await conn.execute(query.encode(), params)).fetchall()

    async def row(self, query: str, *params: object) -> tuple[Any, ...]:
        (found,) = await self.rows(query, *params)
        return found

    async def until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await holds():
                dead = [worker.poll() for worker in self.workers]
                assert not any(dead), self.log.read_text(errors="replace")[-2000:]
                await asyncio.sleep(0.02)

    async def kill(self, number: int) -> None:
        """Kill a worker that has calls out, and start another in its place."""
        victim = self.workers[number]

        async def is_busy() -> bool:
            query = (
                "select count(*) from items i join workers w using (worker_id)"
                " where w.pid = %s and i.status = 'running'"
            )
            return (await self.row(query, victim.pid))[0] >= 3

        await self.until(is_busy)
        victim.kill()
        victim.wait()
        self.workers[number] = self.start_worker()

    async def command(self, *arguments: str) -> str:
        """What a command prints."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app.cli", *arguments),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def report(self, view: str) -> list[dict[str, str]]:
        text = await self.command("report", view, "--format", "csv")
        return list(csv.DictReader(io.StringIO(text)))


@asynccontextmanager
async def running(database: str, folder: Path) -> AsyncGenerator[tuple[Run, UUID]]:
    """All of it but the workers, and a resource with a price; ends whatever is left."""
    key = Keyring.generate()
    settings = Settings(port=0, provider_allow_networks="127.0.0.0/8")
    async with (
        Database(database, size=6) as db,
        server_on(db, settings, key=key) as server,
        service_on(server) as service,
    ):
        run = Run(service, folder, key)
        url = await run.provider.start()
        place: dict[str, Any] = {
            "workspace_id": service.environment.workspace_id,
            "environment_id": service.environment.environment_id,
        }
        async with db.transaction() as conn:
            await prices.put(conn, [price("priced")], workspace_id=None)
            connection_id = await connections.create(
                conn,
                keyring=Keyring(key),
                name="simulated",
                provider="openai-compatible",
                base_url=f"{url}/v1",
                secret=None,
                timeout_ms=30_000,
                **place,
            )
            resource_id = await resources.create(
                conn, connection_id=connection_id, name="priced", model="priced", **place
            )
        try:
            yield run, resource_id
        finally:
            for worker in run.workers:
                worker.kill()
                worker.wait()
            await run.provider.stop()


async def chaos(run: Run, resource_id: UUID) -> Json:
    """Submit over HTTP, kill workers in the middle, and let the last ones finish; the batch."""
    service = run.service
    items = [service.item(f"question {n}") for n in range(ITEMS)]
    body = {"type": "ASYNC", "items": [i | {"resourceId": str(resource_id)} for i in items]}
    created = await service.http.post(service.batches, json=body)
    assert created.status_code == 201, created.text
    path = f"{service.batches}/{created.json()['batchId']}"
    run.workers = [run.start_worker() for _ in range(2)]
    for number in range(KILLS):
        await run.kill(number % 2)

    async def has_ended() -> bool:
        return (await service.get(path, includesItems="false"))["completedAt"] is not None

    await run.until(has_ended)
    for worker in run.workers:
        worker.terminate()
    for worker in run.workers:
        assert await asyncio.to_thread(worker.wait, 30) == 0
    done = False
    while not done:
        async with service.db.transaction() as conn:
            done = await reports.roll_up(conn) == 0
    return await service.get(path, includesItems="false")


def account(run: Run, attempts: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Hold every attempt against what the provider witnessed; the sums that all must show."""
    recorded: dict[str, tuple[Any, ...]] = {}
    lost: Counter[int] = Counter()
    for seq, outcome, request_id, *tokens in attempts:
        if outcome == "lost":
            assert request_id is None
            lost[seq] += 1
        else:
            assert request_id not in recorded
            recorded[request_id] = (seq, outcome, *tokens)
    # Every record is of a call that the provider had, which ended so and used as many tokens.
    for request_id, (_, outcome, *tokens) in recorded.items():
        seen = run.witness[request_id]
        assert outcome == OUTCOMES[seen.fault]
        assert seen.is_answered == (outcome == "answered")
        wanted = [seen.input_tokens, seen.output_tokens] if seen.is_answered else [0, 0]
        assert tokens == wanted
    # One question, one item; and every call that nobody recorded is one of a lost attempt of its item.
    pairs = {(run.witness[name].digest, seq) for name, (seq, *_) in recorded.items()}
    items = dict(pairs)
    assert len(pairs) == len(items) == len(set(items.values())) == ITEMS
    unheard = Counter(
        items[seen.digest] for name, seen in run.witness.items() if name not in recorded
    )
    assert unheard <= lost
    assert lost.total() >= KILLS
    told = run.provider.report()
    assert told["received"] == told["accepted"] == len(run.witness)
    assert told["accepted"] == len(attempts) - lost.total() + unheard.total()
    answers = [run.witness[name] for name, (_, o, *_) in recorded.items() if o == "answered"]
    unheard_answers = [
        w for name, w in run.witness.items() if name not in recorded and w.is_answered
    ]
    used = [sum(w.input_tokens for w in answers), sum(w.output_tokens for w in answers)]
    assert told["answered"] == len(answers) + len(unheard_answers)
    assert told["input_tokens"] == used[0] + sum(w.input_tokens for w in unheard_answers)
    assert told["output_tokens"] == used[1] + sum(w.output_tokens for w in unheard_answers)
    outcomes = Counter(outcome for _, outcome, *_ in attempts)
    assert outcomes.keys() == {"answered", "unreachable", "throttled", "lost"}, "not all was tried"
    return {
        "calls": len(attempts),
        "answered": len(answers),
        **{name: outcomes[name] for name in ("rejected", "throttled", "unreachable", "lost")},
        "input_tokens": used[0],
        "output_tokens": used[1],
        "cost": Decimal(used[0] * INPUT_NANO + used[1] * OUTPUT_NANO) / 10**9,
    }


async def test_views_api_command_line_and_provider_agree_after_chaos(
    database: str, tmp_path: Path
) -> None:
    async with running(say_migrated(database), tmp_path) as (run, resource_id):
        batch = await chaos(run, resource_id)
        attempts = await run.rows(
            "select item_index, outcome, provider_request_id, input_tokens, output_tokens from report.attempts"
        )
        truth = account(run, attempts)
        failed = ITEMS - truth["answered"]
        tokens = (truth["input_tokens"], truth["output_tokens"])

        # The views among themselves.
        sums = "sum(input_tokens)::int, sum(output_tokens)::int, sum(cost)"
        for view in (
            *("batches", "attempts"),
            *("throughput_per_minute", "throughput_per_hour", "cost_per_day"),
        ):
            found = await run.row(f"select {sums} from report.{view}")  # noqa: S608 - constants
            assert found == (*tokens, truth["cost"]), view
        names = ("calls", "answered", "rejected", "throttled", "unreachable", "lost")
        counts = ", ".join(f"sum({name})::int" for name in names)
        for view in ("throughput_per_minute", "throughput_per_hour"):
            found = await run.row(f"select {counts} from report.{view}")  # noqa: S608 - constants
            assert found == tuple(truth[name] for name in names), view
        assert await run.row(
            "select completed_items, failed_items, pending_items + running_items + cancelled_items"
            " from report.batches"
        ) == (truth["answered"], failed, 0)
        assert await run.row(
            "select count(*) filter (where status = 'completed')::int,"
            " count(*) filter (where status = 'failed')::int,"
            " sum(input_tokens) filter (where status = 'completed')::int,"
            " sum(output_tokens) filter (where status = 'completed')::int from report.items"
        ) == (truth["answered"], failed, *tokens)
        assert await run.row(
            "select coalesce(sum(calls), 0)::int, coalesce(sum(open_items), 0)::int from report.failures"
        ) == (truth["calls"] - truth["answered"], failed)
        assert await run.row(
            "select sum(used_requests)::int from report.capacity_per_minute"
            " where scope_kind = 'model' and source = 'observed'"
        ) == (truth["calls"],)

        # The API.
        service = run.service
        assert {name: batch[name] for name in ("completed", "failed", "running", "pending")} == {
            "completed": truth["answered"],
            "failed": failed,
            "running": 0,
            "pending": 0,
        }
        assert (batch["totalPromptTokens"], batch["totalOutputTokens"]) == tokens
        assert batch["totalCost"] == float(truth["cost"])
        now = datetime.now(UTC)
        when = {"start": now - timedelta(minutes=59), "end": now + timedelta(minutes=1)}
        metrics = ("requestCount", "successCount", "errorCount", "promptTokens", "outputTokens")
        asked = await service.http.post(
            f"/v1/request-usage/{service.tenant}",
            json={
                "agg": dict.fromkeys(metrics, "sum"),
                "filter": {"dateRange": {name: at.isoformat() for name, at in when.items()}},
            },
        )
        assert asked.status_code == 200, asked.text
        (used,) = asked.json()
        calls, answered = truth["calls"], truth["answered"]
        assert tuple(used[name] for name in metrics) == (
            *(calls, answered, calls - answered),
            *tokens,
        )
        rate = await service.get(
            f"/v1/completion-metric/{service.tenant}/{resource_id}/error-rate", window="60"
        )
        assert (rate["totalRequests"], rate["totalSuccess"]) == (calls, answered)

        # The command line.
        showing = run.command(
            *("batches", "show", batch["batchId"]),
            *("--server", service.url, "--key", service.key),
        )
        views = ("batches", "throughput_per_hour", "cost_per_day")
        shown, reported = await asyncio.gather(
            showing, asyncio.gather(*(run.report(view) for view in views))
        )
        printed, hours, _ = reported
        facts = dict(
            line.split(maxsplit=1) for line in shown.splitlines() if len(line.split()) == 2
        )
        assert facts["answered"] == str(answered)
        assert f"tokens in   {tokens[0]:,}" in shown
        assert f"tokens out  {tokens[1]:,}" in shown
        assert f"cost        {float(truth['cost']):g} USD" in shown
        assert [row["completed_items"] for row in printed] == [str(answered)]
        assert sum(int(row["calls"]) for row in hours) == calls
        assert sum(int(row["lost"]) for row in hours) == truth["lost"]
        for rows in reported:
            assert sum(int(row["input_tokens"]) for row in rows) == tokens[0]
            assert sum(int(row["output_tokens"]) for row in rows) == tokens[1]
            assert sum(Decimal(row["cost"] or 0) for row in rows) == truth["cost"]
