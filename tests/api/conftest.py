"""The real API over loopback HTTP; the test plays the worker.

``service``       a tenant of the test's own, on a server and a database that the folder shares.
``lone_service``  the same on a server and a database of the test's own: to stop it, to take its
                  database away, to give it other ``settings``.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import pytest
from litestar import Litestar

from app import api_keys, connections, queue, resources, tenants
from app.api import application
from app.api.context import Context
from app.api.streams import Hub
from app.db import Connection, Database, Query
from app.doorbell import EVENTS
from app.ids import uuid7
from app.queue import Item, Outcome, Settlement
from app.secrets import Keyring
from app.settings import Settings
from app.tenants import Environment
from tests.conftest import cloned
from tests.issuer import AUDIENCE, FakeIssuer, fake_issuer

Json = dict[str, Any]


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens in this loop, within a deadline."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - what is awaited tells nobody
            await asyncio.sleep(0.01)


@dataclass(slots=True, kw_only=True)
class Server:
    """A served API."""

    url: str
    db: Database
    settings: Settings
    keyring: Keyring
    app: Litestar
    stop: asyncio.Event

    @property
    def context(self) -> Context:
        return self.app.state.context

    @property
    def hub(self) -> Hub:
        return self.context.hub

    async def stored(self) -> tuple[int, int]:
        """Batches and items in the database, whoever owns them."""
        async with self.db.connection() as conn:
            cursor = await conn.execute(
                "select (select count(*) from batches), (select count(*) from items)"
            )
            row = await cursor.fetchone()
        assert row is not None
        return row[0], row[1]

    async def settled_down(self) -> None:
        """Nothing that a test began goes on: no stream is followed, no chore is left."""
        context, hub = self.context, self.hub
        await until(lambda: not hub._followed and not context.chores)  # pyright: ignore[reportPrivateUsage] - the leak looked for


@dataclass(slots=True, kw_only=True)
class Service(Server):
    """A served API, a tenant with a connection and a resource, and a client with its key."""

    environment: Environment
    connection_id: UUID
    resource_id: UUID
    key: str
    key_id: UUID
    http: httpx.AsyncClient
    stored_before: tuple[int, int]
    worker_id: UUID = field(default_factory=uuid7)
    silent: bool = False  # the worker's rings are all lost

    @property
    def batches(self) -> str:
        return f"/v1/completion-batch/{self.tenant}"

    @property
    def tenant(self) -> str:
        return f"{self.environment.workspace_id}/{self.environment.environment_id}"

    async def added(self) -> tuple[int, int]:
        """Batches and items that came since the test began, whoever owns them."""
        batches, items = await self.stored()
        return batches - self.stored_before[0], items - self.stored_before[1]

    def item(self, text: str = "hello", **more: object) -> Json:
        request = {"messages": [{"role": "user", "content": text}]}
        return {"resourceId": str(self.resource_id), "request": request, **more}

    async def create(self, *texts: str, **more: object) -> Json:
        """An ASYNC batch with these prompts."""
        body = {"type": "ASYNC", "items": [self.item(t) for t in texts or ("hello",)], **more}
        answer = await self.http.post(self.batches, json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def get(self, path: str, **params: str) -> Json:
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    # The worker, step by step ---------------------------------------------------------------------

    async def claim(self, want: int = 100) -> list[Item]:
        async with self.db.transaction() as conn:
            taken = await queue.claim(
                conn,
                workspace_id=self.environment.workspace_id,
                resource_id=self.resource_id,
                worker_id=self.worker_id,
                want=want,
                alone=True,
                guard_s=0.75,
                burst_s=60,
                slow_start=0,
                grace_s=60.0,
            )
        self.ring(taken.items)
        return taken.items

    async def settle(
        self,
        items: Sequence[Item],
        outcome: Outcome = Outcome.answered,
        *,
        body: str = '{"id":"chatcmpl-1","choices":[{"message":{"content":"ok"}}]}',
        error: str | None = None,
    ) -> None:
        settlements = [
            Settlement(
                batch_day=item.batch_day,
                batch_id=item.batch_id,
                resource_id=item.resource_id,
                connection_id=self.connection_id,
                seq=item.seq,
                attempt=item.attempt,
                outcome=outcome,
                claimed_at=item.claimed_at,
                limit_ids=item.limit_ids,
                reserved_input_tokens=item.input_tokens,
                reserved_output_tokens=item.output_tokens,
                expected_output_tokens=item.expected_output_tokens,
                refund=False,
                latency_ms=5,
                wait_s=0.0 if outcome is Outcome.unreachable else None,
                status_code=200 if outcome is Outcome.answered else 400,
                error_code=error,
                error_message=None if error is None else "the provider said no",
                model="gpt-test" if outcome is Outcome.answered else None,
                input_tokens=7 if outcome is Outcome.answered else None,
                output_tokens=3 if outcome is Outcome.answered else None,
                headers={"x-request-id": "req_1"},
            )
            for item in items
        ]
        bodies = [body if outcome is Outcome.answered else None] * len(items)
        async with self.db.transaction() as conn:
            settled = await queue.settle(
                conn,
                workspace_id=self.environment.workspace_id,
                worker_id=self.worker_id,
                settlements=settlements,
                bodies=bodies,
            )
        assert all(s.settled for s in settled)
        self.ring(items)

    def ring(self, items: Sequence[Item]) -> None:
        if not self.silent:
            self.context.ringer.ring(EVENTS, {item.batch_id for item in items})

    async def fail(self, items: Sequence[Item]) -> None:
        await self.settle(items, Outcome.rejected, error="bad_request")

    async def retry(self, items: Sequence[Item]) -> None:
        await self.settle(items, Outcome.unreachable, error="server_error")

    async def expire(self) -> None:
        """What maintenance does with this tenant's batches whose deadline has passed."""
        async with self.db.transaction() as conn:
            for flow in await queue.expired(conn):
                if flow.workspace_id == self.environment.workspace_id:
                    await queue.expire(conn, flow=flow)

    async def work(self) -> None:
        """Answer everything there is."""
        while items := await self.claim():
            await self.settle(items)

    # Streams --------------------------------------------------------------------------------------

    def reader(self, answer: httpx.Response) -> "Reader":
        return Reader(answer)

    @asynccontextmanager
    async def follow(
        self, batch: Mapping[str, Any], *, headers: Mapping[str, str] | None = None, **params: str
    ) -> AsyncGenerator["Reader"]:
        path = f"{self.batches}/{batch['batchId']}/events"
        async with self.http.stream("GET", path, params=params, headers=headers) as answer:
            assert answer.status_code == 200
            yield Reader(answer)


class Reader:
    """Reads a stream of events block by block."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self._blocks = self._split()

    async def _split(self) -> AsyncIterator[str]:
        text = b""
        async for piece in self.answer.aiter_raw():
            text += piece
            while b"\n\n" in text:
                block, text = text.split(b"\n\n", 1)
                yield block.decode()
        assert not text

    async def block(self) -> str | None:
        """The next block as it came; None at the end of the stream."""
        async with asyncio.timeout(20):
            return await anext(self._blocks, None)

    async def event(self) -> tuple[int, str, Json] | None:
        """The next event: number, action, payload. None at ``[DONE]``."""
        while (block := await self.block()) is not None:
            if block == ": ping" or block.startswith('data: {"action":"batch-progress"'):
                continue
            if block == "data: [DONE]":
                return None
            first, second = block.split("\n")
            told = json.loads(second.removeprefix("data: "))
            assert set(told) == {"action", "payload"}
            return int(first.removeprefix("id: ")), told["action"], told["payload"]
        raise AssertionError("the stream ended without a terminator")

    async def rest(self) -> list[tuple[int, str, Json]]:
        """Every event up to ``[DONE]``, after which the stream must end."""
        told: list[tuple[int, str, Json]] = []
        while (event := await self.event()) is not None:
            told.append(event)
        assert await self.block() is None
        return told


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the statements that were executed, as they are; the test may clear it."""
    executed: list[str] = []
    every = Query[Any].all

    async def noted(self: Query[Any], conn: Connection, **params: object) -> list[Any]:
        executed.append(self.name)
        return await every(self, conn, **params)

    monkeypatch.setattr(Query, "all", noted)
    return executed


@pytest.fixture
def settings() -> Settings:
    """Overridden by tests that need others."""
    return Settings(port=0, provider_allow_networks="127.0.0.0/8")


@asynccontextmanager
async def served(
    settings: Settings, db: Database, keyring: Keyring, apps: list[Litestar]
) -> AsyncGenerator[tuple[str, asyncio.Event]]:
    """``serve`` in this loop; its app is put into ``apps``."""
    made = application.create_app

    def remembered(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - passes through
        apps.append(made(*args, **more))
        return apps[-1]

    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    application.create_app = remembered
    try:
        serving = asyncio.create_task(
            application.serve(
                settings, db, keyring=keyring, listen_url=db.url, stop=stop, ready=url.set_result
            )
        )
        await asyncio.wait({serving, url}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        application.create_app = made
    try:
        if not url.done():
            await serving  # raises
        yield url.result(), stop
    finally:
        stop.set()
        await serving


@asynccontextmanager
async def server_on(
    db: Database, settings: Settings, *, key: str | None = None
) -> AsyncGenerator[Server]:
    keyring = Keyring(key or Keyring.generate())
    apps: list[Litestar] = []
    async with served(settings, db, keyring, apps) as (url, stop):
        yield Server(url=url, db=db, settings=settings, keyring=keyring, app=apps[0], stop=stop)


@asynccontextmanager
async def service_on(server: Server) -> AsyncGenerator[Service]:
    """A new tenant on it."""
    async with server.db.transaction() as conn:
        environment = await tenants.create_workspace(conn, name="acme", environment="test")
        workspace_id, environment_id = environment.workspace_id, environment.environment_id
        connection_id = await connections.create(
            conn,
            workspace_id=workspace_id,
            environment_id=environment_id,
            keyring=server.keyring,
            name="fake",
            provider="openai-compatible",
            base_url="http://127.0.0.1:9/v1",
            secret="sk-secret",
            timeout_ms=1000,
        )
        resource_id = await resources.create(
            conn,
            workspace_id=workspace_id,
            environment_id=environment_id,
            connection_id=connection_id,
            name="small",
            model="gpt-test",
        )
        key_id, key = await api_keys.create(
            conn, workspace_id=workspace_id, environment_id=environment_id, name="all"
        )
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=60, trust_env=False
    ) as http:
        yield Service(
            url=server.url,
            db=server.db,
            settings=server.settings,
            keyring=server.keyring,
            app=server.app,
            stop=server.stop,
            environment=environment,
            connection_id=connection_id,
            resource_id=resource_id,
            key=key,
            key_id=key_id,
            http=http,
            stored_before=await server.stored(),
        )


@pytest.fixture(scope="package")
def shared_api_database(cluster: str, template: str) -> Iterator[str]:
    with cloned(cluster, template) as url:
        yield url


@pytest.fixture(scope="package")
def issuer() -> Iterator[FakeIssuer]:
    """Who signs the tokens of users for the shared server."""
    with fake_issuer() as made:
        yield made


@pytest.fixture(scope="package")
async def shared_server(shared_api_database: str, issuer: FakeIssuer) -> AsyncIterator[Server]:
    known = Settings(
        port=0,
        oidc_issuer=issuer.url,
        oidc_audience=AUDIENCE,
        provider_allow_networks="127.0.0.0/8",
    )
    async with (
        Database(shared_api_database, size=6) as db,
        server_on(db, known) as server,
    ):
        yield server


@pytest.fixture
async def service(shared_server: Server) -> AsyncIterator[Service]:
    """A tenant of the test's own."""
    async with service_on(shared_server) as made:
        yield made
    await shared_server.settled_down()


@pytest.fixture
async def lone_service(db: Database, settings: Settings) -> AsyncIterator[Service]:
    """A tenant on a server and a database of the test's own."""
    async with server_on(db, settings) as server, service_on(server) as made:
        yield made
