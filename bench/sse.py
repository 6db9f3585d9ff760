"""How soon do a thousand listeners of one batch see what was committed, and does one miss anything?

Method. A Postgres (embedded, fsync on), one API process (``sluice serve``), two processes of listeners
that read raw bytes from sockets, and this process, which plays the worker: it claims and settles items
of one batch at an even rate through ``app.queue``, each in a commit of its own, and rings as a worker does.
All on this machine. The moment of a commit is when its COMMIT returned here; the moment of arrival is when
a listener's process was given the bytes by its event loop; both by the machine's monotonic clock.
Every listener follows with ``?slim=true`` and checks that numbers come one by one. In the middle the API is
killed with SIGKILL and started again on the same port; listeners reconnect with ``Last-Event-ID`` after
50 to 500 ms, at random, and try again until they are let in.

It reports latency before the kill, and from the moment on that all have caught up again; CPU and memory
of the API and of both listening processes; and fails unless every listener got every event once and in order.

    python -m bench sse --quick
    python -m bench sse --listeners 1000 --rate 20 --seconds 60
"""

import argparse
import array
import asyncio
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import uvloop

from app import (
    api_keys,
    connections,
    embedded,
    intake,
    migrate,
    queue,
    resources,
    settings,
    tenants,
)
from app.db import CONNECTION_ERRORS, Database
from app.doorbell import EVENTS, Ringer
from app.ids import uuid7
from app.intake import Ingest, NewBatch, NewItem
from app.queue import Item, Outcome, Settlement
from app.secrets import Keyring, load_or_create_key_file
from bench import _figures
from bench._figures import Figure, Part, Run

LIMIT_S = 240.0
START_S = 60.0
_EVENT = re.compile(rb"id: (\d+)\ndata: ")
_KEEP = 64  # bytes of a piece that may be the beginning of an event's head
_BODY = b'{"messages":[{"role":"user","content":"Where is my card?"}]}'
_ANSWER = '{"id":"chatcmpl-1","choices":[{"message":{"role":"assistant","content":"On its way."}}]}'


def arguments() -> argparse.ArgumentParser:
    """What the command line may say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--listeners", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20.0, help="items per second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--replicas", type=int, default=1, help="API processes; one is killed")
    parser.add_argument("--quick", action="store_true", help="100 listeners for 16 seconds")
    parser.add_argument("--database", help="one with the schema, instead of a new embedded server")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run it once; exit 1 unless every listener got everything once and in order."""
    if "--home" in sys.argv:  # as a part of all
        _figures.run("sse", measure)
        return
    options = arguments().parse_args()
    if options.listen:
        uvloop.run(_listen(**json.loads(options.listen)))
        return
    if options.quick:
        options.listeners, options.seconds = 100, 16.0
    with tempfile.TemporaryDirectory(prefix="sluice-sse-") as home:
        figures = asyncio.run(_Run(options, Path(home)).run())
    for name, value in figures.items():
        print(f"{name:58} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    sys.exit(0 if not figures["gaps or repeats"] and figures["complete"] else 1)


async def measure(run: Run) -> Part:
    """The same as a line of the table; on a Postgres of its own, as its method says."""
    options = arguments().parse_args(["--quick"] if run.quick else [])
    if options.quick:
        options.listeners, options.seconds = 100, 16.0
    with tempfile.TemporaryDirectory(prefix="sluice-sse-") as home:
        found = await _Run(options, Path(home)).run()
    p99 = found.get("commit to client before the kill, p99, ms")
    ours = float(p99) if isinstance(p99, int | float) else None
    is_complete = bool(found["complete"]) and not found["gaps or repeats"]
    return Part(
        figures=[
            Figure(
                what=f"commit to {options.listeners:,} slim listeners at {options.rate:g} items/s, p99",
                unit="ms",
                ours=ours,
                target="< 250, none missed",
                met=is_complete and ours is not None and ours < 250,
            )
        ],
        notes=[f"sse: {name} {value}" for name, value in found.items()],
    )


# Listeners ----------------------------------------------------------------------------------------


class Listener(asyncio.Protocol):
    """One follower: raw bytes in, numbers and times out; reconnects until ``[DONE]``."""

    def __init__(self, head: str, last: int, times: "array.array[float]") -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.last = last
        self.wrong = 0
        self._head = head
        self._times = times
        self._tail: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        resume = f"last-event-id: {self.last}\r\n" if self.last else ""
        cast("asyncio.Transport", transport).write(f"{self._head}{resume}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        text = self._tail + data
        end = 0
        for found in _EVENT.finditer(text):
            number = int(found[1])
            if number != self.last + 1:
                self.wrong += 1
            self.last = number
            self._times[number] = now
            end = found.end()
        if b"data: [DONE]\n\n" in text[end:] and not self.ended.done():
            self.ended.set_result(True)
        self._tail = text[max(end, len(text) - _KEEP) :]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        if not self.ended.done():
            self.ended.set_result(False)


def _same(listener: Listener) -> Listener:
    return listener


async def _listen(
    *, host: str, ports: list[int], path: str, key: str, listeners: int, events: int, output: str
) -> None:
    """Follow with so many sockets until all were told ``[DONE]``; leave the times in a file."""
    loop = asyncio.get_running_loop()
    head = f"GET {path} HTTP/1.1\r\nhost: {host}\r\nx-api-key: {key}\r\n"
    times = [array.array("d", bytes(8 * (events + 1))) for _ in range(listeners)]
    wrong = connections = seen = 0
    present = asyncio.Event()

    async def follow(number: int, mine: "array.array[float]") -> None:
        nonlocal wrong, connections, seen
        last = 0
        for turn in itertools.count(number):
            told = Listener(head, last, mine)
            port = ports[turn % len(ports)]  # another replica whenever one broke off
            try:
                transport, _ = await loop.create_connection(partial(_same, told), host, port)
            except OSError:
                await asyncio.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - jitter
                continue
            connections += 1
            while not last and not told.last and not told.ended.done():  # noqa: ASYNC110 - the hot path tells nobody
                await asyncio.sleep(0.05)
            if not last and told.last:
                seen += 1
                if seen == listeners:
                    present.set()
            done = await told.ended
            transport.close()
            last, wrong = told.last, wrong + told.wrong
            if done:
                return
            await asyncio.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - jitter

    async with asyncio.TaskGroup() as group:
        for number, each in enumerate(times):
            group.create_task(follow(number, each))
        await present.wait()
        print("present", flush=True)
    with Path(output).open("wb") as file:  # noqa: ASYNC230 - all is over
        for each in times:
            each.tofile(file)
    print(json.dumps({"wrong": wrong, "connections": connections}), flush=True)


# The run ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Use:
    """CPU seconds and the most memory of a process, read from /proc."""

    cpu_s: float
    peak_mb: float

    @classmethod
    def of(cls, pid: int) -> "Use":
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        status = Path(f"/proc/{pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        return cls(cpu_s=ticks / os.sysconf("SC_CLK_TCK"), peak_mb=int(peak[1]) / 1024)


@dataclass(slots=True)
class _Run:
    options: argparse.Namespace
    home: Path
    committed: list[float] = field(default_factory=lambda: [0.0])
    """When each event was committed, by its number."""
    connecting_s: float = 0.0

    async def run(self) -> dict[str, Any]:
        if self.options.database:
            async with Database(self.options.database, size=3) as db:
                return await self.on(db)
        server = embedded.acquire(self.home)
        try:
            migrate.migrate(server.url)
            async with Database(server.url, size=3) as db:
                return await self.on(db)
        finally:
            server.release()

    async def on(self, db: Database) -> dict[str, Any]:
        options = self.options
        keyring = Keyring(load_or_create_key_file(self.home / "secret-key"))
        tenant, resource_id, key = await _tenant(db, keyring)
        items = max(int(options.rate * options.seconds), 1)
        batch = await _submit(db, tenant, resource_id, items)
        events = 3 + 2 * items  # created, running, two of each item, completed
        ports = [_free_port() for _ in range(options.replicas)]
        path = (
            f"/v1/completion-batch/{tenant.workspace_id}/{tenant.environment_id}/"
            f"{batch.batch_id}/events?slim=true"
        )
        asks = {"host": "127.0.0.1", "ports": ports, "path": path, "key": key, "events": events}
        async with self.api(db.url, ports) as lives, self.listeners(asks) as listening:
            victim = lives[0]
            before = [Use.of(process.pid) for process in (victim, *listening)]
            worker = _Worker(db, tenant, resource_id, self.committed)
            begun = time.monotonic()
            driving = asyncio.create_task(worker.drive(items, options.rate))
            await asyncio.sleep(options.seconds / 2)
            middle = [Use.of(process.pid) for process in (victim, *listening)]
            killed = time.monotonic()
            victim.kill()
            victim.wait()
            lives.append(self.serve(db.url, ports[0]))
            await driving
            ended = time.monotonic()
            told = [json.loads(await asyncio.to_thread(_line, p)) for p in listening]
            after = Use.of(lives[-1].pid)
        times = self.times(events, len(told))
        return self.figures(times, told, [before, middle], after, begun, killed, ended)

    @asynccontextmanager
    async def api(
        self, url: str, ports: Sequence[int]
    ) -> AsyncGenerator[list[subprocess.Popen[bytes]]]:
        lives = [self.serve(url, port) for port in ports]
        try:
            async with asyncio.timeout(START_S):
                for port, life in zip(ports, lives, strict=True):
                    await _listens(port, life)
            yield lives
        finally:
            for life in lives:
                life.kill()
                life.wait()

    def serve(self, url: str, port: int) -> subprocess.Popen[bytes]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(settings.PREFIX)}  # noqa: TID251 - for the programs it starts
        key = (self.home / "secret-key").read_text().strip()
        variables = {
            "SLUICE_DATABASE_URL": url,
            "SLUICE_PORT": str(port),
            "SLUICE_LOG_LEVEL": "warning",
            "SLUICE_SECRET_KEY": key,
        }
        command = [sys.executable, "-m", "app.cli", "serve"]
        return subprocess.Popen(command, env=inherited | variables, stdout=subprocess.DEVNULL)

    @asynccontextmanager
    async def listeners(
        self, asks: dict[str, Any]
    ) -> AsyncGenerator[Sequence[subprocess.Popen[bytes]]]:
        """Two processes; entered once all of their listeners have seen the first event."""
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(2):
                share = (self.options.listeners + number) // 2
                mine = asks | {"listeners": share, "output": str(self.home / f"times-{number}")}
                processes.append(_start_listening(mine))
            begun = time.monotonic()
            async with asyncio.timeout(START_S + self.options.listeners / 50):
                for process in processes:
                    assert await asyncio.to_thread(_line, process) == b"present\n"
            self.connecting_s = time.monotonic() - begun
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def times(self, events: int, processes: int) -> list["array.array[float]"]:
        """Of every listener when each event came, by its number; 0: never."""
        found: list[array.array[float]] = []
        for number in range(processes):
            flat = array.array("d")
            flat.frombytes((self.home / f"times-{number}").read_bytes())
            found += [flat[n : n + events + 1] for n in range(0, len(flat), events + 1)]
        return found

    def figures(  # noqa: PLR0917 - one run's raw facts
        self,
        times: Sequence["array.array[float]"],
        told: Sequence[dict[str, int]],
        uses: Sequence[Sequence[Use]],
        last_use: Use,
        begun: float,
        killed: float,
        ended: float,
    ) -> dict[str, Any]:
        committed = self.committed
        events = len(times[0]) - 1
        missing = sum(1 for each in times for number in range(1, events + 1) if not each[number])
        # What was committed while the API was away came late to all: the last of these arrivals is
        # when everybody had caught up.
        lost = [n for n in range(2, events + 1) if committed[n] > killed - 1.0]
        caught = killed
        for number in lost:
            latest = max(each[number] for each in times)
            if latest - committed[number] < 1.0 and committed[number] > killed:
                break
            caught = max(caught, latest)
        steady = [n for n in range(2, events + 1) if committed[n] < killed - 1.0]
        again = [n for n in range(2, events + 1) if committed[n] > caught]
        (api0, *ears0), (api1, *ears1) = uses
        span = killed - begun
        frames = len(times) * sum(1 for moment in committed[2:] if moment < killed)
        return {
            "listeners": len(times),
            "API processes": self.options.replicas,
            "items per second": round((events - 3) / 2 / (ended - begun), 1),
            "events of the batch": events,
            "complete": missing == 0,
            "missing": missing,
            "gaps or repeats": sum(each["wrong"] for each in told),
            "from the start of all until each had its first event, s": round(self.connecting_s, 2),
            "connections made": sum(each["connections"] for each in told),
            **_spread("before the kill", committed, times, steady),
            **_spread("after the restart", committed, times, again),
            "from SIGKILL until all had caught up, s": round(caught - killed, 2),
            "API: CPU, % of a core before the kill": round(
                100 * (api1.cpu_s - api0.cpu_s) / span, 1
            ),
            "API: CPU per event and listener before the kill, µs": round(
                1e6 * (api1.cpu_s - api0.cpu_s) / frames, 1
            ),
            "API: peak memory of both lives, MB": [round(u.peak_mb) for u in (api1, last_use)],
            "listeners: CPU of each process, % of a core": [
                round(100 * (b.cpu_s - a.cpu_s) / span, 1)
                for a, b in zip(ears0, ears1, strict=True)
            ],
            "listeners: peak memory of each, MB": [round(u.peak_mb) for u in ears1],
            "load of the machine": os.getloadavg(),
        }


def _spread(
    when: str,
    committed: Sequence[float],
    times: Sequence["array.array[float]"],
    numbers: Sequence[int],
) -> dict[str, object]:
    late = sorted(each[n] - committed[n] for each in times for n in numbers if each[n])
    if not late:
        return {f"commit to client {when}": "nothing was measured"}
    return {
        f"commit to client {when}, {name}, ms": round(1000 * late[int(share * (len(late) - 1))], 1)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


async def _listens(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise RuntimeError("the API did not start; its log says why")


def _start_listening(asks: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.sse", "--listen", json.dumps(asks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


async def _tenant(db: Database, keyring: Keyring) -> tuple[tenants.Environment, UUID, str]:
    async with db.transaction() as conn:
        tenant = await tenants.create_workspace(conn, name="bench", environment="bench")
        ids: dict[str, Any] = {
            "workspace_id": tenant.workspace_id,
            "environment_id": tenant.environment_id,
        }
        connection_id = await connections.create(
            conn,
            keyring=keyring,
            name="none",
            provider="openai-compatible",
            base_url="http://127.0.0.1:9/v1",
            secret=None,
            timeout_ms=30_000,
            **ids,
        )
        resource_id = await resources.create(
            conn, connection_id=connection_id, name="none", model="none", **ids
        )
        _, key = await api_keys.create(conn, name="bench", **ids)
    return tenant, resource_id, key


async def _submit(
    db: Database, tenant: tenants.Environment, resource_id: UUID, items: int
) -> NewBatch:
    ids: dict[str, Any] = {
        "workspace_id": tenant.workspace_id,
        "environment_id": tenant.environment_id,
    }
    batch = NewBatch(type="async", **ids)
    async with db.connection() as conn:
        await intake.prepare_day(conn, batch)
    async with db.transaction() as conn:
        resource = await resources.get(conn, resource_id=resource_id, **ids)
        assert resource is not None
        ingest = Ingest(conn, batch, {resource_id: resource})
        await ingest.add([NewItem(resource_id=resource_id, body=_BODY)] * items)
        await ingest.finish()
    return batch


class _Worker:
    """Claims and settles one item at a time, and notes when its events were committed."""

    def __init__(
        self, db: Database, tenant: tenants.Environment, resource_id: UUID, committed: list[float]
    ) -> None:
        self._db = db
        self._workspace_id = tenant.workspace_id
        self._resource_id = resource_id
        self._worker_id = uuid7()
        self._ringer = Ringer(db)
        self._committed = committed
        committed.append(0.0)  # batch-created

    async def drive(self, items: int, rate: float) -> None:
        """All items at that rate; each is settled when the next one is claimed."""
        ringing = asyncio.create_task(self._ringer.run())
        clock = time.monotonic
        begun = clock()
        held: list[Item] = []
        for number in range(items + 1):
            await asyncio.sleep(max(0.0, begun + number / rate - clock()))
            if held:
                await self._settle(held[0], is_last=number == items)
            if number < items:
                held = await self._claim(is_first=number == 0)
        await self._ringer.flush()
        ringing.cancel()

    async def _claim(self, *, is_first: bool) -> list[Item]:
        while True:
            try:
                async with self._db.transaction() as conn:
                    taken = await queue.claim(
                        conn,
                        workspace_id=self._workspace_id,
                        resource_id=self._resource_id,
                        worker_id=self._worker_id,
                        want=1,
                        alone=True,
                        guard_s=0.75,
                        grace_s=60.0,
                        burst_s=60,
                        slow_start=0,
                    )
            except CONNECTION_ERRORS:
                await asyncio.sleep(0.1)
                continue
            if taken.items:
                self._note(taken.items[0].batch_id, 2 if is_first else 1)
                return taken.items
            await asyncio.sleep(0.01)

    async def _settle(self, item: Item, *, is_last: bool) -> None:
        settlement = Settlement(
            batch_day=item.batch_day,
            batch_id=item.batch_id,
            resource_id=item.resource_id,
            connection_id=None,
            seq=item.seq,
            attempt=item.attempt,
            outcome=Outcome.answered,
            claimed_at=item.claimed_at,
            limit_ids=item.limit_ids,
            reserved_input_tokens=item.input_tokens,
            reserved_output_tokens=item.output_tokens,
            expected_output_tokens=item.expected_output_tokens,
            refund=False,
            latency_ms=50,
            status_code=200,
            model="none",
            input_tokens=7,
            output_tokens=3,
        )
        async with self._db.transaction() as conn:
            await queue.settle(
                conn,
                workspace_id=self._workspace_id,
                worker_id=self._worker_id,
                settlements=[settlement],
                bodies=[_ANSWER],
            )
        self._note(item.batch_id, 2 if is_last else 1)

    def _note(self, batch_id: UUID, events: int) -> None:
        """These events have just been committed; ring for them."""
        self._committed += [time.monotonic()] * events
        self._ringer.ring(EVENTS, [batch_id])


if __name__ == "__main__":
    main()
