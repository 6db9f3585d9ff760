"""The doctor finds what is wrong, and only that."""

from collections.abc import AsyncIterator

import psycopg
import pytest

from app import connections, migrate, resources, tenants
from app.capacity import Amount
from app.db import Connection, Database
from app.doctor import Finding, examine
from app.intake import Ingest, NewBatch, NewItem, prepare_day
from app.secrets import Keyring
from app.settings import Settings

SETTINGS = Settings()
KEYRING = Keyring(Keyring.generate())


async def wrong(url: str, keyring: Keyring | None = KEYRING) -> list[Finding]:
    """What is not well; fsync is off on the tests' server, and is left out."""
    found = await examine(SETTINGS, url=url, keyring=keyring)
    return [f for f in found if not f.is_well and not f.what.startswith("fsync")]


@pytest.fixture
async def clean(db: Database) -> AsyncIterator[Connection]:
    """A database at head with a batch of two items and a limit."""
    async with db.connection() as conn:
        await conn.execute(
            "create table if not exists alembic_version (version_num text primary key)"
        )
        await conn.execute(
            "insert into alembic_version values (%s) on conflict do nothing", (migrate.head(),)
        )
        made = await tenants.create_workspace(conn, name="w", environment="e")
        ids = (made.workspace_id, made.environment_id)
        connection_id = await connections.create(
            conn,
            keyring=KEYRING,
            workspace_id=ids[0],
            environment_id=ids[1],
            name="c",
            provider="openai",
            base_url="http://127.0.0.1:9/v1",
            secret="sk-secret",
            timeout_ms=1000,
            amounts=[Amount(period="minute", requests=5, tokens=None)],
        )
        resource_id = await resources.create(
            conn,
            workspace_id=ids[0],
            environment_id=ids[1],
            connection_id=connection_id,
            name="r",
            model="m",
        )
        resource = await resources.get(
            conn, workspace_id=ids[0], environment_id=ids[1], resource_id=resource_id
        )
        assert resource is not None
        batch = NewBatch(workspace_id=ids[0], environment_id=ids[1], type="async")
        await prepare_day(conn, batch)
        async with conn.transaction():
            ingest = Ingest(conn, batch, {resource_id: resource})
            body = b'{"messages":[{"role":"user","content":"hi"}]}'
            await ingest.add([NewItem(resource_id=resource_id, body=body)] * 2)
            await ingest.finish()
        yield conn


@pytest.mark.usefixtures("clean")
async def test_sound_deployment_has_nothing_to_mend(database: str) -> None:
    assert await wrong(database) == []


async def test_database_that_was_not_migrated_is_told(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("drop table if exists alembic_version")
    (found,) = await wrong(database)
    assert found.remedy == "Run: sluice migrate"


async def test_dead_database_is_told() -> None:
    (found,) = await wrong("postgresql://127.0.0.1:9/none")
    assert "does not answer" in found.what


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("update flows set total = total + 1, pending = pending + 1", "counters of 1 flows"),
        (
            """insert into ledger
            select workspace_id, limit_id, slot_of(period, sliding, now()), 1, 0, 0 from limits
            where source = 'given'""",
            "1 slots of the ledger differ",
        ),
        ("update flows set floor = 2, unstarted = 2", "2 unstarted items lie below the floor"),
        (
            """insert into workers (worker_id, host, machine, pid, version, heartbeat_at)
            values (gen_random_uuid(), 'h', 'm', 1, 'v', now() - interval '1 hour')""",
            "1 workers fell silent",
        ),
        ("update ready set next_at = now() - interval '2 minutes'", "Work has been waiting"),
        ("update connections set secret_key_id = 'gone'", "secret of connection 'c'"),
    ],
)
async def test_damage_is_found(clean: Connection, database: str, damage: str, told: str) -> None:
    await clean.execute(damage.encode())
    found = await wrong(database)
    assert [told in f.what for f in found] == [True], found


@pytest.mark.usefixtures("clean")
async def test_secrets_without_a_key_are_told(database: str) -> None:
    (found,) = await wrong(database, keyring=None)
    assert "no key is configured" in found.what
