"""What benchmarks of the whole service share: a Postgres, a simulator and workers, for one run.

The Postgres is embedded with fsync on; the workers are the command ``sluice worker``; the simulator is
``sluice simulate``. All of it is on loopback, keeps its files in the folder it is given, and is stopped
by its process ids. What the engine's interfaces may change is in `Rig`'s methods and nowhere else.
"""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen
from uuid import UUID

import psycopg
from psycopg import sql

from app import (
    api_keys,
    batches,
    connections,
    doctor,
    embedded,
    intake,
    migrate,
    resources,
    settings,
    tenants,
)
from app.batches import Batch
from app.capacity import Amount
from app.db import Database
from app.doorbell import WORK, Ringer
from app.intake import Ingest, NewBatch, NewItem
from app.secrets import Keyring, load_or_create_key_file

START_S = 60.0
STOP_S = 60.0


def made_anew(url: str, name: str) -> str:
    """The address of an empty database of that name on the same server."""
    drop(url, name)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def drop(url: str, name: str) -> None:
    """Make sure that the server has no database of that name, which costs the next part disk and autovacuum."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        )


class Rig:
    """One run's servers and processes, and one tenant; ``open`` starts it and ends all of it."""

    def __init__(
        self,
        home: Path,
        server: embedded.Embedded,
        db: Database,
        *,
        variables: Mapping[str, str],
        worker_log: Path | None,
    ) -> None:
        self.home = home
        self.server = server
        self.db = db
        self.workers: list[subprocess.Popen[bytes]] = []
        self.provider = ""
        """The simulator's address, without ``/v1``."""
        self.committed_at = 0.0
        """When the last batch was committed, by ``time.perf_counter``."""
        self._simulator: subprocess.Popen[bytes] | None = None
        self._apis: list[subprocess.Popen[bytes]] = []
        self._worker_log = worker_log
        # Settings of whoever runs the benchmark would lead the processes elsewhere.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(settings.PREFIX)}  # noqa: TID251 - for the programs it starts
        self.environment = {
            **inherited,
            "SLUICE_HOME": str(home),
            "SLUICE_PROVIDER_ALLOW_NETWORKS": "127.0.0.0/8",
            "SLUICE_LOG_LEVEL": "warning",
            **variables,
        }
        key = load_or_create_key_file(home / "secret-key")
        self._keyring = Keyring(key)
        if db.url != server.url:
            self.environment |= {"SLUICE_DATABASE_URL": db.url, "SLUICE_SECRET_KEY": key}
        self._tenant: tenants.Environment | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        home: Path,
        *,
        simulate: Mapping[str, object] | None = None,
        variables: Mapping[str, str] | None = None,
        worker_log: Path | None = None,
        database: str | None = None,
        pool: int = 3,
    ) -> AsyncGenerator[Self]:
        """Start Postgres and a simulator with that behaviour, and make a tenant; no workers yet.

        ``simulate`` None: no simulator. ``variables`` are settings of the workers, whose log goes to
        ``worker_log`` or to ours. ``database``: one of its own on the server, made anew.
        """
        server = embedded.acquire(home)
        try:
            url = server.url if database is None else made_anew(server.url, database)
            migrate.migrate(url)
            async with Database(url, size=pool, revive=server.ensure_running) as db:
                rig = cls(home, server, db, variables=variables or {}, worker_log=worker_log)
                try:
                    if simulate is not None:
                        rig._start_simulator()
                        # Not by flags: the command knows only a part of what a simulator can do.
                        await rig.behave(**simulate)
                    async with db.transaction() as conn:
                        rig._tenant = await tenants.create_workspace(
                            conn, name="bench", environment="bench"
                        )
                    yield rig
                finally:
                    rig._kill()
            if database is not None:
                drop(server.url, database)
        finally:
            server.release()

    # Processes -------------------------------------------------------------------------------------

    def start_worker(self) -> subprocess.Popen[bytes]:
        """One more worker process, which the caller keeps in ``workers``."""
        command = [sys.executable, "-m", "app.cli", "worker"]
        if self._worker_log is None:
            return subprocess.Popen(command, env=self.environment)
        with self._worker_log.open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stderr=log)

    def start_api(self) -> tuple[subprocess.Popen[bytes], str]:
        """An API process and its address; it ends with the rig."""
        command = [sys.executable, "-m", "app.cli", "serve", "--port", "0"]
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE)
        self._apis.append(process)
        return process, _address(process)

    async def start_workers(self, number: int) -> None:
        """Start so many and wait until all have begun, so that they compete from the first item."""
        self.workers += [self.start_worker() for _ in range(number)]
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            async with self.db.connection() as conn:
                row = await (
                    await conn.execute("select count(*) from workers where stopped_at is null")
                ).fetchone()
            if row is not None and int(row[0]) >= len(self.workers):
                return
            if any(worker.poll() is not None for worker in self.workers):
                raise RuntimeError(f"a worker did not start: {self._told()}")
            await asyncio.sleep(0.1)
        raise RuntimeError(f"the workers did not start within {START_S:.0f} s: {self._told()}")

    async def stop_workers(self) -> None:
        """Let them finish their calls and write them, as on SIGTERM."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            await asyncio.to_thread(worker.wait, STOP_S)

    def _told(self) -> str:
        """The end of the workers' log."""
        if self._worker_log is None or not self._worker_log.exists():
            return "see its log"
        return self._worker_log.read_text(errors="replace")[-800:]

    def errors(self) -> list[str]:
        """What the workers logged as an error: bugs of ours, whatever the figures say."""
        if self._worker_log is None or not self._worker_log.exists():
            return []
        lines = self._worker_log.read_text(errors="replace").splitlines()
        return [line for line in lines if " ERROR " in line]

    def _start_simulator(self) -> None:
        command = [sys.executable, "-m", "app.cli", "simulate", "--port", "0", "--seed", "1"]
        process = self._simulator = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE
        )
        self.provider = _address(process).removesuffix("/v1")

    def _kill(self) -> None:
        for process in (
            *self.workers,
            *self._apis,
            *([self._simulator] if self._simulator else []),
        ):
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def kill_postgres(self) -> None:
        """SIGKILL to the postmaster; whoever misses it first starts it again."""
        pid = int((self.server.data_dir / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)

    # The simulator ---------------------------------------------------------------------------------

    async def report(self) -> dict[str, Any]:
        """What clients did to the simulator so far (`app.simulator.Simulator.report`)."""
        return await asyncio.to_thread(self._ask, "/report", None)

    async def behave(self, **behaviour: object) -> None:
        """Change fields of the simulator's behaviour (`app.simulator.Behaviour`)."""
        await asyncio.to_thread(self._ask, "/behaviour", json.dumps(behaviour).encode())

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        request = Request(self.provider + path, data=body)  # noqa: S310 - our simulator's
        with urlopen(request, timeout=10) as reply:  # noqa: S310 - our simulator's
            return cast("dict[str, Any]", json.loads(reply.read()))

    # The tenant ------------------------------------------------------------------------------------

    @property
    def ids(self) -> dict[str, Any]:
        """The tenant and its environment, as parameters."""
        assert self._tenant is not None
        return {
            "workspace_id": self._tenant.workspace_id,
            "environment_id": self._tenant.environment_id,
        }

    async def create_connection(self, name: str, amounts: Sequence[Amount] = ()) -> UUID:
        """An account at the simulator."""
        async with self.db.transaction() as conn:
            return await connections.create(
                conn,
                keyring=self._keyring,
                name=name,
                provider="openai-compatible",
                base_url=f"{self.provider}/v1",
                secret=None,
                timeout_ms=30_000,
                amounts=amounts,
                **self.ids,
            )

    async def create_resource(
        self, name: str, amounts: Sequence[Amount] = (), *, connection_id: UUID | None = None
    ) -> UUID:
        """A model, on an account of its own unless one is given."""
        if connection_id is None:
            connection_id = await self.create_connection(name)
        async with self.db.transaction() as conn:
            return await resources.create(
                conn,
                connection_id=connection_id,
                name=name,
                model="simulated",
                amounts=amounts,
                **self.ids,
            )

    async def create_key(self, name: str, amounts: Sequence[Amount]) -> UUID:
        """A key that may create batches."""
        async with self.db.transaction() as conn:
            key_id, _ = await api_keys.create(conn, name=name, amounts=amounts, **self.ids)
        return key_id

    async def submit(
        self,
        resource_id: UUID,
        bodies: Sequence[bytes],
        fields: Mapping[str, Any] | None = None,
    ) -> NewBatch:
        """A batch of these requests, with further fields of `NewBatch`."""
        batch = NewBatch(type="async", **self.ids, **(fields or {}))
        async with self.db.connection() as conn:
            await intake.prepare_day(conn, batch)
        async with self.db.transaction() as conn:
            resource = await resources.get(conn, resource_id=resource_id, **self.ids)
            assert resource is not None
            ingest = Ingest(conn, batch, {resource_id: resource})
            for start in range(0, len(bodies), 2000):
                await ingest.add(
                    [
                        NewItem(resource_id=resource_id, body=body)
                        for body in bodies[start : start + 2000]
                    ]
                )
            await ingest.finish()
        self.committed_at = time.perf_counter()
        # As the API does. Without the ring an idle worker finds it at its next look, within 5 s.
        ringer = Ringer(self.db)
        ringer.ring(WORK, [resource_id])
        await ringer.flush()
        return batch

    async def batch(self, batch: NewBatch) -> Batch:
        """How far a batch is. Fails as the database does while that is away."""
        async with self.db.connection() as conn:
            found = await batches.get(conn, batch_id=batch.batch_id, **self.ids)
        assert found is not None
        return found

    async def pause(self, batch: NewBatch) -> None:
        """Let claims pass a batch by."""
        async with self.db.transaction() as conn:
            await batches.pause(
                conn, workspace_id=self.ids["workspace_id"], batch_id=batch.batch_id
            )

    async def findings(self) -> list[str]:
        """What ``sluice doctor`` would have mended: counters and ledger recounted, and the rest."""
        known = settings.load({"home": self.home})
        found = await doctor.examine(known, url=self.server.url, keyring=None)
        return [finding.what for finding in found if not finding.is_well]


def _address(process: subprocess.Popen[bytes]) -> str:
    """The first address that a process prints, which it does when it listens."""
    assert process.stdout is not None
    if select.select([process.stdout], [], [], START_S)[0]:
        # What it prints comes at once; to look again with select would miss what is buffered.
        for line in process.stdout:
            for word in line.decode().split():
                if word.startswith("http://"):
                    return word.rstrip(".,/")
    raise RuntimeError(f"{process.args!r} did not start")
