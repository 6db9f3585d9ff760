"""``sluice run`` by itself: the database, the worker and the file in one process.

A run is known by its digest (file, prompts, model, base URL, parameters). Its rows lie in one batch
or several: ``--limit 10`` makes one of the first ten, the same command without it another of the
rest, so nothing is asked twice. Batches carry ``run:<digest>:<generation>:<first row>`` as their
idempotency key; ``--fresh`` begins a new generation.

A run that was interrupted is paused, so that no other worker on the same database (the next run,
``sluice up``) pays for what its owner stopped. The same command resumes it.
"""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import UUID

import click

from app import batches, capacity, connections, intake, items, queue, resources, tenants
from app.batches import TERMINAL, Batch, RunBatch
from app.capacity import Amount
from app.cli import INTERRUPTED, TERMINATED
from app.cli.answers import Tally, write_answers
from app.cli.processes import on_signals
from app.cli.progress import Progress, Snapshot, duration
from app.cli.store import Store
from app.db import CONNECTION_ERRORS, Connection, Database
from app.doorbell import WORK, Ringer
from app.errors import InputError, SecretError, UsageError
from app.inputs import Input, Row, digest
from app.intake import Ingest, NewBatch, NewItem
from app.items import Result
from app.maintenance import Maintenance
from app.resources import Resource
from app.supervision import Supervisor
from app.worker import Worker

#: Where questions go when nothing else is said.
OPENAI = "https://api.openai.com/v1"

_WORKSPACE = "local"
_ENVIRONMENT = "default"
_LOOK_S = 0.25
#: Rows per COPY; fewer when their requests are large.
_CHUNK_ROWS = 2000
_CHUNK_BYTES = 16 * 1024 * 1024
_ITEM = re.compile(r"items\[(\d+)\]")
_SAFE = "The answers are safe in the database: run the same command again, nothing is sent twice."


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What ``sluice run`` was asked to do. ``limit``: only the first rows; None: all."""

    input: Input
    output: Path
    model: str
    base_url: str
    key: str | None
    rpm: int | None = None
    tpm: int | None = None
    limit: int | None = None
    fresh: bool = False
    timeout_s: float | None = None
    samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tenant:
    workspace_id: UUID
    environment_id: UUID
    resource: Resource

    @property
    def resource_id(self) -> UUID:
        return self.resource.resource_id


class _Interrupt:
    """What Ctrl-C and SIGTERM do, which depends on how far the run is."""

    def __init__(self, view: Progress) -> None:
        self._view = view
        self._main = asyncio.current_task()
        self.worker: Worker | None = None
        self.exit_code: int | None = None

    def first(self, number: signal.Signals) -> None:
        self.exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if self.worker is None:
            assert self._main is not None
            self._main.cancel()
            return
        calls = self.worker.in_flight
        doing = f"finishing {calls:,} calls in flight (Ctrl-C again to abandon them)"
        self._view.say(f"Stopping: {doing}. Run the same command to go on.")
        self.worker.stop.set()

    def then(self) -> None:
        if self.worker is not None:
            self.worker.force.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended. ``exit_code``: 0 all answered, 1 some failed, 130 interrupted."""

    exit_code: int
    tally: Tally | None = None


async def run_locally(store: Store, job: Job) -> Ended:
    """Do the job and tell the person."""
    before = _Unchanged(job)
    run = await asyncio.to_thread(before.digest)
    async with store.database("sluice-run") as db:
        with Progress() as view:
            interrupt = _Interrupt(view)
            with on_signals(interrupt.first, interrupt.then):
                running = _Run(store, db, job, run=run, view=view)
                try:
                    sent = await running.prepare(before)
                    if sent:
                        await running.work(interrupt)
                except asyncio.CancelledError:
                    if interrupt.exit_code is None:
                        raise
                    with contextlib.suppress(*CONNECTION_ERRORS):
                        await running.pause()
                    view.say("Stopped before anything was sent.")
                    return Ended(exit_code=interrupt.exit_code)
        tally = await running.write(before)
    _summarize(job, tally, seconds=view.seconds, sent=sent, ended=running.last)
    if interrupt.exit_code is not None and tally.unanswered:
        return Ended(exit_code=interrupt.exit_code, tally=tally)
    return Ended(exit_code=0 if tally.answered == tally.rows else 1, tally=tally)


class _Unchanged:
    """The input file as it was when its digest was taken."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stamp = self._look()
        self._digest = ""

    def digest(self) -> str:
        job = self._job
        self._digest = digest(job.input, model=job.model, base_url=job.base_url)
        return self._digest

    def require(self, consequence: str) -> None:
        """Raises InputError when the file is another one by now."""
        if self._look() == self._stamp:
            return
        job = self._job
        if digest(job.input, model=job.model, base_url=job.base_url) != self._digest:
            raise InputError(f"{job.input.path} was changed meanwhile; {consequence}")

    def _look(self) -> tuple[int, int, int]:
        try:
            seen = self._job.input.path.stat()
        except OSError:
            return (0, 0, 0)  # the digest then says what is wrong
        return (seen.st_size, seen.st_mtime_ns, seen.st_ino)


class _Run:
    """One run on one database."""

    _tenant: _Tenant

    def __init__(self, store: Store, db: Database, job: Job, *, run: str, view: Progress) -> None:
        self._store = store
        self._settings = store.settings
        self._db = db
        self._job = job
        self._run = run
        self._view = view
        self._known: list[RunBatch] = []
        self._paused = False
        self.last: Snapshot | None = None

    # Preparing ----------------------------------------------------------------------------------

    async def prepare(self, before: _Unchanged) -> bool:
        """Bring the run's rows into the queue; whether anything is left to send."""
        self._tenant = await self._db.persist(self._set_up, what="preparing the run")
        generation = await self._db.persist(self._choose_generation, what="looking for the run")
        await self._add_rows(generation, before)
        redriven = await self._db.persist(self._redrive, what="trying failed rows again")
        if redriven:
            rows = "row" if redriven == 1 else "rows"
            again = "it" if redriven == 1 else "them"
            self._view.say(f"{redriven:,} {rows} failed last time; trying {again} again.")
        return await self._db.persist(self._resume, what="going on")

    async def _set_up(self) -> _Tenant:
        """The command line's own workspace, connection and resource, with this run's limits."""
        job = self._job
        async with self._db.transaction() as conn:
            await tenants.lock_setup(conn)
            place = await tenants.environment_named(
                conn, workspace=_WORKSPACE, environment=_ENVIRONMENT
            ) or await tenants.create_workspace(
                conn,
                name=_WORKSPACE,
                environment=_ENVIRONMENT,
                description="runs of the command line",
            )
            connection_id = await self._connection(
                conn, workspace_id=place.workspace_id, environment_id=place.environment_id
            )
            timeout_ms = None if job.timeout_s is None else round(job.timeout_s * 1000)
            name = f"{job.model} at {job.base_url}"
            found = await resources.named(
                conn,
                workspace_id=place.workspace_id,
                environment_id=place.environment_id,
                name=name,
            )
            if found is None:
                resource_id = await resources.create(
                    conn,
                    workspace_id=place.workspace_id,
                    environment_id=place.environment_id,
                    connection_id=connection_id,
                    name=name,
                    model=job.model,
                    timeout_ms=timeout_ms,
                )
            else:
                resource_id = found.resource_id
                await resources.set_timeout(
                    conn,
                    workspace_id=place.workspace_id,
                    resource_id=resource_id,
                    timeout_ms=timeout_ms,
                )
            await capacity.set_limits(
                conn,
                workspace_id=place.workspace_id,
                scope_id=resource_id,
                amounts=[Amount(period="minute", requests=job.rpm, tokens=job.tpm)],
            )
            resource = await resources.get(
                conn,
                workspace_id=place.workspace_id,
                environment_id=place.environment_id,
                resource_id=resource_id,
            )
            assert resource is not None
            return _Tenant(
                workspace_id=place.workspace_id,
                environment_id=place.environment_id,
                resource=resource,
            )

    async def _connection(
        self, conn: Connection, *, workspace_id: UUID, environment_id: UUID
    ) -> UUID:
        job, keyring = self._job, self._store.keyring
        found = await connections.named(
            conn, workspace_id=workspace_id, environment_id=environment_id, name=job.base_url
        )
        if job.key is None and job.base_url == OPENAI and (found is None or found.secret is None):
            raise UsageError(f"{OPENAI} needs a key: set OPENAI_API_KEY, or give --api-key.")
        if found is None:
            return await connections.create(
                conn,
                keyring=keyring,
                workspace_id=workspace_id,
                environment_id=environment_id,
                name=job.base_url,
                provider="openai",
                base_url=job.base_url,
                secret=job.key,
                timeout_ms=self._settings.default_timeout_ms,
            )
        try:
            held = connections.open_secret(keyring, found)
        except SecretError:
            if job.key is None:
                raise
            held = None
        if job.key is not None and job.key != held:
            await connections.set_secret(
                conn,
                keyring=keyring,
                workspace_id=workspace_id,
                connection_id=found.connection_id,
                secret=job.key,
            )
        return found.connection_id

    async def _choose_generation(self) -> int:
        """The newest one, or with ``--fresh`` the next, and then the older ones are cancelled."""
        async with self._db.connection() as conn:
            known = await self._batches_of_run(conn)
        newest = max((b.generation for b in known), default=0)
        if not self._job.fresh:
            return max(newest, 1)
        for batch in known:
            if batch.status not in TERMINAL:
                async with self._db.transaction() as conn:
                    await queue.cancel(
                        conn, workspace_id=self._tenant.workspace_id, batch_id=batch.batch_id
                    )
        return newest + 1

    async def _batches_of_run(self, conn: Connection) -> list[RunBatch]:
        return await batches.of_run(
            conn,
            workspace_id=self._tenant.workspace_id,
            environment_id=self._tenant.environment_id,
            run=f"run:{self._run}",
        )

    async def _add_rows(self, generation: int, before: _Unchanged) -> None:
        """Make batches until all rows wanted are in one; another process may be making them too."""
        limit = self._job.limit
        while True:
            async with self._db.connection() as conn:
                known = await self._batches_of_run(conn)
            self._known = [b for b in known if b.generation == generation]
            covered = max((b.first_row + b.total_items for b in self._known), default=0)
            if limit is not None:
                self._known = [b for b in self._known if b.first_row < limit]
                if covered >= limit:
                    break
            batch = self._batch(generation, covered)
            async with self._db.connection() as conn:
                await intake.prepare_day(conn, batch)
            added = await self._db.persist(
                lambda b=batch, c=covered: self._ingest(b, c, before), what="storing the rows"
            )
            if not added:
                break

    def _batch(self, generation: int, first_row: int) -> NewBatch:
        return NewBatch(
            workspace_id=self._tenant.workspace_id,
            environment_id=self._tenant.environment_id,
            type="async",
            endpoint=self._job.input.endpoint,
            name=self._job.input.path.name,
            metadata={
                "run": self._run,
                "generation": generation,
                "firstRow": first_row,
                "file": self._job.input.path.name,
            },
            max_attempts=self._settings.max_attempts,
            idempotency_key=f"run:{self._run}:{generation}:{first_row}",
            request_hash=bytes.fromhex(self._run),
        )

    async def _ingest(self, batch: NewBatch, first_row: int, before: _Unchanged) -> bool:
        """Store the rows from one on; False when there are none."""
        tenant = self._tenant
        async with self._db.transaction() as conn:
            assert batch.idempotency_key is not None
            assert batch.request_hash is not None
            known = await intake.replay(
                conn,
                workspace_id=tenant.workspace_id,
                environment_id=tenant.environment_id,
                idempotency_key=batch.idempotency_key,
                request_hash=batch.request_hash,
            )
            if known is not None:
                return True
            ingest = Ingest(
                conn,
                batch,
                {tenant.resource_id: tenant.resource},
                most_item_bytes=self._settings.max_item_bytes,
            )
            chunks = _chunks(islice(self._job.input.rows(), first_row, self._job.limit))
            while chunk := await asyncio.to_thread(next, chunks, None):
                begun = ingest.count
                await ingest.add(
                    [
                        NewItem(
                            resource_id=tenant.resource_id, body=row.body, custom_id=row.custom_id
                        )
                        for row in chunk
                    ]
                )
                if ingest.problems:
                    raise _located(self._job.input, ingest, chunk, begun)
            if not ingest.count:
                return False
            await asyncio.to_thread(before.require, "nothing was sent. Run the command again.")
            await ingest.finish()
            return True

    async def _redrive(self) -> int:
        """Put the failed rows of finished batches back; how many."""
        total = 0
        for batch in self._known:
            if batch.status != "failed":
                continue
            some = 1
            while some:
                async with self._db.transaction() as conn:
                    some = await batches.redrive(
                        conn, workspace_id=self._tenant.workspace_id, batch_id=batch.batch_id
                    )
                total += some
        return total

    async def _resume(self) -> bool:
        """Wake what is open of the run; whether anything is."""
        ringer = Ringer(self._db)
        open_ones = [b for b in await self._read() if not b.is_finished]
        for batch in open_ones:
            async with self._db.transaction() as conn:
                woken = await batches.resume(
                    conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
                )
            ringer.ring(WORK, woken)
        await ringer.flush()
        return bool(open_ones)

    async def _read(self) -> list[Batch]:
        async with self._db.connection() as conn:
            found = [
                await batches.get(
                    conn,
                    workspace_id=self._tenant.workspace_id,
                    environment_id=self._tenant.environment_id,
                    batch_id=known.batch_id,
                )
                for known in self._known
            ]
        return [batch for batch in found if batch is not None]

    # Working ------------------------------------------------------------------------------------

    async def work(self, interrupt: _Interrupt) -> None:
        """Answer what is open, until nothing is or a signal comes."""
        worker = Worker(
            self._settings,
            self._db,
            keyring=self._store.keyring,
            listen_url=self._store.direct_url,
        )
        maintenance = Supervisor("run")
        duty = Maintenance(
            self._settings, self._db, holder_id=worker.worker_id, give_way=self._store.give_way
        )
        maintenance.start("maintenance", duty.run)
        working = asyncio.create_task(worker.run())
        interrupt.worker = worker
        try:
            while not working.done():
                if await self._db.persist(self._look, what="reading progress", stop=worker.force):
                    worker.stop.set()
                elif interrupt.exit_code is None:
                    await self._db.persist(self._resume_paused, what="going on", stop=worker.stop)
                await asyncio.wait({working}, timeout=_LOOK_S)
        finally:
            worker.stop.set()
            await working
            await maintenance.stop()
        if interrupt.exit_code is not None:
            with contextlib.suppress(*CONNECTION_ERRORS):
                await self.pause()
        with contextlib.suppress(*CONNECTION_ERRORS):
            await self._look()

    async def _look(self) -> bool:
        """Read and show how far the run is; whether it is finished."""
        found = await self._read()
        tenant = self._tenant
        async with self._db.connection() as conn:
            uses = await capacity.used(
                conn,
                workspace_id=tenant.workspace_id,
                scope_ids=[tenant.resource_id, tenant.resource.connection_id],
                guard_s=self._settings.guard_s,
            )
            waits = [
                (due.next_at - due.now).total_seconds()
                for due in await queue.due(conn)
                if due.resource_id == tenant.resource_id
            ]
        share, kind = _tightest(uses)
        self.last = Snapshot(
            total=sum(b.total_items for b in found),
            answered=sum(b.completed for b in found),
            failed=sum(b.failed for b in found),
            cancelled=sum(b.cancelled for b in found),
            in_flight=sum(b.running for b in found),
            input_tokens=sum(b.input_tokens for b in found),
            output_tokens=sum(b.output_tokens for b in found),
            limit_share=share,
            limit_kind=kind,
            wait_s=max(waits[0], 0.0) if waits and any(b.pending for b in found) else None,
        )
        self._paused = any(b.is_paused and not b.is_finished for b in found)
        self._view.show(self.last)
        return all(b.is_finished for b in found)

    async def _resume_paused(self) -> None:
        """Another process that ran the same was interrupted, and paused what is being run here."""
        if self._paused:
            await self._resume()

    async def pause(self) -> None:
        """Let no worker go on with the run until it is asked for again."""
        for batch in await self._read():
            if not batch.is_finished:
                async with self._db.transaction() as conn:
                    await batches.pause(
                        conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
                    )

    # Writing ------------------------------------------------------------------------------------

    async def write(self, before: _Unchanged) -> Tally:
        """Write the answers there are."""
        before.require(f"its answers do not fit it any more. Restore it. {_SAFE}")
        most = self._job.limit
        if most is None:
            most = max((b.first_row + b.total_items for b in self._known), default=0)
        return await self._db.persist(lambda: self._write(most), what="writing the answers")

    async def _write(self, most: int) -> Tally:
        async with (
            self._db.transaction() as conn,
            contextlib.aclosing(self._results(conn)) as results,
        ):
            return await write_answers(
                self._job.input,
                self._job.output,
                results,
                most=most,
                remedy=f"Make room, or choose another --output. {_SAFE}",
                samples=self._job.samples,
            )

    async def _results(self, conn: Connection) -> AsyncGenerator[Result]:
        for batch in self._known:
            found = items.results(
                conn,
                workspace_id=self._tenant.workspace_id,
                batch_id=batch.batch_id,
                batch_day=batch.batch_day,
            )
            async with contextlib.aclosing(found) as results:
                async for result in results:
                    yield result


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in lists of bounded number and size."""
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.body)
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _located(given: Input, ingest: Ingest, chunk: list[Row], begun: int) -> InputError:
    """The first problem, with the line of the file in place of the number of the item."""
    problem = ingest.problems[0]
    item = _ITEM.match(problem.path)
    line = chunk[int(item[1]) - begun].line if item else 1
    said = problem.message
    text = said if said.startswith("its ") else f"the request {said}"
    others = len(ingest.problems) - 1
    more = f" ({others:,} more like it; nothing was sent)" if others else " (nothing was sent)"
    return InputError(f"{given.path} line {line}: {text}{more}")


def _tightest(uses: list[capacity.LimitUse]) -> tuple[float | None, str | None]:
    """The fullest limit's share and what it counts."""
    shares: list[tuple[float, str]] = []
    for use in uses:
        if use.requests is not None:
            shares.append((use.used_requests / use.requests, f"{use.requests:,} requests a minute"))
        if use.tokens is not None:
            shares.append((use.used_tokens / use.tokens, f"{use.tokens:,} tokens a minute"))
    return max(shares, default=(None, None))


def _summarize(
    job: Job, tally: Tally, *, seconds: float, sent: bool, ended: Snapshot | None
) -> None:
    shown = _shown(job.output)
    if not sent and not tally.failed and not tally.unanswered:
        click.echo(
            f"All {tally.rows:,} rows were answered before; nothing was sent. Answers: {shown}"
        )
        return
    facts = f"Answered {tally.answered:,} of {tally.rows:,} rows in {duration(seconds)}"
    if ended is not None:
        facts += f" ({ended.input_tokens:,} tokens in, {ended.output_tokens:,} out)"
    click.echo(f"{facts}. Answers: {shown}")
    if tally.failed:
        told, rows = tally.reasons.most_common(1)[0]
        count = f"{tally.failed:,} rows" if tally.failed > 1 else "1 row"
        often = f"most often ({rows:,} times)" if len(tally.reasons) > 1 else "because"
        click.echo(f"{count} failed, {often}: {told}")
        click.echo(_advice(tally))
    if tally.unanswered:
        click.echo(
            f"{tally.unanswered:,} rows are not answered yet; run the same command to go on."
        )


def _advice(tally: Tally) -> str:
    if "cancelled" in tally.reasons:
        return "Cancelled rows stay as they are; --fresh begins anew."
    return "The file says why for each. Run the same command to try them again."


def _shown(path: Path) -> str:
    """As the person would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
