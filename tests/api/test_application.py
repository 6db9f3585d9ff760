"""The server: health, documentation, request ids, what happens without a database, and stopping."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from app import migrate
from app.api import application
from app.db import Database
from app.errors import SluiceError
from app.secrets import Keyring
from app.settings import Settings
from tests.api.conftest import Service


async def test_health_needs_no_key(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as http:
        for path in ("/healthz", "/healthcheck"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_ready_means_a_database_with_the_schema(lone_service: Service) -> None:
    behind = await lone_service.http.get("/readyz")
    assert (behind.status_code, behind.json()["errorCode"]) == (503, "SCHEMA_OUT_OF_DATE")
    assert migrate.head() in behind.json()["errorMessage"]
    async with lone_service.db.connection() as conn:
        await conn.execute("create table alembic_version (version_num text)")
        await conn.execute("insert into alembic_version values (%s)", (migrate.head(),))
    assert (await lone_service.http.get("/readyz")).status_code == 200


async def test_the_documentation_names_every_route(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as http:
        assert (await http.get("/docs")).status_code == 200
        told = (await http.get("/docs/openapi.json")).json()
    assert told["info"]["title"] == "Sluice"
    assert set(told["components"]["securitySchemes"]) == {"apiKey", "bearer"}
    create = told["paths"]["/v1/completion-batch/{workspaceId}/{environmentId}"]["post"]
    examples = create["requestBody"]["content"]["application/json"]["examples"]
    assert examples["sync"]["value"]["type"] == "SYNC"
    assert {p["name"] for p in create["parameters"]} == {
        "workspaceId", "environmentId", "slim", "strict",
    }  # fmt: skip
    item = told["components"]["schemas"]["ItemBody"]["properties"]
    assert {"outputTokens", "completionTokens", "customId"} <= set(item)


async def test_every_answer_has_a_request_id(service: Service) -> None:
    for path in ("/healthz", "/nowhere", "/v1/whoami", f"{service.batches}/x"):
        minted = (await service.http.get(path)).headers["x-request-id"]
        assert len(minted) == 32
        kept = await service.http.get(path, headers={"x-request-id": "my-id.1"})
        assert kept.headers["x-request-id"] == "my-id.1"
        other = await service.http.get(path, headers={"x-request-id": "not\tsane" * 40})
        assert len(other.headers["x-request-id"]) == 32


async def test_the_frameworks_refusals_look_like_ours(service: Service) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("DELETE", service.batches, 405),
        ("GET", f"{service.batches}/x/y/z", 404),
    ):
        answer = await service.http.request(method, path)
        assert answer.status_code == status
        told = answer.json()
        assert set(told) == {"errorMessage", "errorCode", "details"}
        assert told["errorCode"] == str(status)


async def test_a_dead_database_is_a_503_and_health_goes_on(
    lone_service: Service, cluster: str
) -> None:
    batch = await lone_service.create()
    name = str(conninfo_to_dict(lone_service.db.url)["dbname"])
    pool = lone_service.db._pool  # pyright: ignore[reportPrivateUsage]
    pool.timeout = 0.2  # how long a request waits for a connection
    with psycopg.connect(cluster, autocommit=True) as conn:
        conn.execute(f"alter database {name} allow_connections false".encode())
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,)
        )
        for method, path in (
            ("GET", f"{lone_service.batches}/{batch['batchId']}"),
            ("POST", lone_service.batches),
            ("GET", "/v1/whoami"),
        ):
            answer = await lone_service.http.request(method, path, json={"type": "ASYNC"})
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "2"
            assert answer.json()["errorCode"] == "DATABASE_UNAVAILABLE"
            assert name not in answer.text
        assert (await lone_service.http.get("/readyz")).status_code == 503
        assert (await lone_service.http.get("/healthz")).status_code == 200
        conn.execute(f"alter database {name} allow_connections true".encode())
    pool.timeout = 10
    assert (await lone_service.get(f"{lone_service.batches}/{batch['batchId']}"))[
        "status"
    ] == "PENDING"


@asynccontextmanager
async def serving(settings: Settings, db: Database) -> AsyncGenerator[tuple[str, asyncio.Event]]:
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        application.serve(
            settings,
            db,
            keyring=Keyring(Keyring.generate()),
            listen_url=db.url,
            stop=stop,
            ready=url.set_result,
        )
    )
    await asyncio.wait({task, url}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task  # raises
    try:
        yield url.result(), stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def test_a_port_in_use_is_told_as_a_sentence(db: Database) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SluiceError) as told:
            async with serving(Settings(port=port), db):
                pass
    assert str(told.value) == (
        f"Port {port} on 127.0.0.1 is in use; choose another with --port or SLUICE_PORT."
    )


async def test_an_address_of_another_machine_is_told_as_a_sentence(db: Database) -> None:
    for host in ("203.0.113.1", "no.such.host.invalid"):
        with pytest.raises(SluiceError, match="choose"):
            async with serving(Settings(host=host, port=0), db):
                pass


async def test_routes_can_have_a_prefix(db: Database) -> None:
    async with (
        serving(Settings(port=0, base_path="/api/"), db) as (url, _),
        httpx.AsyncClient(base_url=url, trust_env=False) as http,
    ):
        assert (await http.get("/api/v1/whoami")).status_code == 401
        assert (await http.get("/v1/whoami")).status_code == 404
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/api/docs/openapi.json")).status_code == 200


def test_a_server_that_stops_leaves_nothing_running(database: str) -> None:
    """In a loop of its own, where no other server is at work."""

    async def serve() -> set[str]:
        async with Database(database, size=6) as db:
            before = asyncio.all_tasks()
            async with (
                serving(Settings(port=0), db) as (url, _),
                httpx.AsyncClient(base_url=url, trust_env=False) as http,
            ):
                assert (await http.get("/healthz")).status_code == 200
            return {t.get_name() for t in asyncio.all_tasks() - before}

    assert not asyncio.run(serve())


async def test_a_stream_does_not_hold_up_a_stop(lone_service: Service) -> None:
    batch = await lone_service.create()
    async with lone_service.follow(batch) as stream:
        await stream.event()
        lone_service.stop.set()
        async with asyncio.timeout(5):
            with pytest.raises(AssertionError, match="without a terminator"):
                await stream.event()
