"""Quotas of a workspace: what waits in the queue is bounded, exactly, also when many create at once."""

import asyncio

import pytest

from app import connections, intake, queue, quotas, resources, tenants
from app.db import Connection, Database
from app.errors import QuotaError, TooLargeError
from app.intake import Ingest, NewBatch, NewItem
from app.quotas import Amounts
from app.resources import Resource
from app.secrets import Keyring

_BODY = b'{"messages":[{"role":"user","content":"hello"}]}'
_ANY = Amounts(items=0, batches=0, bytes=0)


@pytest.fixture
async def resource(db: Database) -> Resource:
    """A tenant's resource."""
    async with db.transaction() as conn:
        tenant = await tenants.create_workspace(conn, name="acme", environment="test")
        ids = {"workspace_id": tenant.workspace_id, "environment_id": tenant.environment_id}
        connection_id = await connections.create(
            conn,
            keyring=Keyring(Keyring.generate()),
            name="fake",
            provider="openai-compatible",
            base_url="http://127.0.0.1:9/v1",
            secret=None,
            timeout_ms=1000,
            workspace_id=tenant.workspace_id,
            environment_id=tenant.environment_id,
        )
        resource_id = await resources.create(
            conn,
            connection_id=connection_id,
            name="small",
            model="gpt-test",
            workspace_id=tenant.workspace_id,
            environment_id=tenant.environment_id,
        )
        found = await resources.get(conn, resource_id=resource_id, **ids)
    assert found is not None
    return found


async def create(
    db: Database, resource: Resource, *, quota: Amounts, items: int = 1, body: bytes = _BODY
) -> NewBatch:
    batch = NewBatch(
        workspace_id=resource.workspace_id, environment_id=resource.environment_id, type="async"
    )
    async with db.connection() as conn:
        await intake.prepare_day(conn, batch)
    async with db.transaction() as conn:
        ingest = Ingest(conn, batch, {resource.resource_id: resource}, quota=quota)
        await ingest.add([NewItem(resource_id=resource.resource_id, body=body)] * items)
        await ingest.finish()
    return batch


async def counted(conn: Connection) -> tuple[int, int]:
    cursor = await conn.execute(
        "select (select count(*) from batches), (select count(*) from items)"
    )
    row = await cursor.fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.parametrize(
    ("quota", "named"),
    [
        (Amounts(items=5, batches=0, bytes=0), ("items", 5, 4, 2)),
        (Amounts(items=0, batches=2, bytes=0), ("batches", 2, 2, 1)),
        (
            Amounts(items=0, batches=0, bytes=5 * len(_BODY)),
            ("bytes", 5 * len(_BODY), 4 * len(_BODY), 2 * len(_BODY)),
        ),
    ],
)
async def test_what_exceeds_a_quota_is_refused_whole(
    db: Database, resource: Resource, quota: Amounts, named: tuple[str, int, int, int]
) -> None:
    for _ in range(2):
        await create(db, resource, quota=quota, items=2)
    with pytest.raises(QuotaError) as told:
        await create(db, resource, quota=quota, items=2)
    assert told.value.details == dict(zip(("quota", "limit", "used", "asked"), named, strict=True))
    assert f"SLUICE_QUOTA_{named[0].upper()}" in str(told.value)
    async with db.connection() as conn:
        assert await counted(conn) == (2, 4)


async def test_of_many_creations_at_once_exactly_so_many_fit(
    db: Database, resource: Resource
) -> None:
    """Each counts its own items and those of every creation that committed before it."""
    quota = Amounts(items=10, batches=0, bytes=0)

    async def one() -> bool:
        try:
            await create(db, resource, quota=quota, items=3)
        except QuotaError:
            return False
        return True

    fitted = await asyncio.gather(*[one() for _ in range(12)])
    assert sum(fitted) == 3
    async with db.connection() as conn:
        assert await counted(conn) == (3, 9)


async def test_what_ended_makes_room(db: Database, resource: Resource) -> None:
    quota = Amounts(items=2, batches=1, bytes=2 * len(_BODY))
    first = await create(db, resource, quota=quota, items=2)
    with pytest.raises(QuotaError):
        await create(db, resource, quota=quota)
    async with db.transaction() as conn:
        await queue.cancel(conn, workspace_id=first.workspace_id, batch_id=first.batch_id)
        await queue.cancel_chunk(
            conn,
            workspace_id=first.workspace_id,
            batch_day=first.batch_day,
            batch_id=first.batch_id,
        )
    await create(db, resource, quota=quota, items=2)


async def test_what_can_never_fit_says_so(db: Database, resource: Resource) -> None:
    with pytest.raises(TooLargeError, match="split the batch") as told:
        await create(db, resource, quota=Amounts(items=2, batches=0, bytes=0), items=3)
    assert told.value.code == quotas.CODE


async def test_a_workspace_may_have_quotas_of_its_own(db: Database, resource: Resource) -> None:
    async with db.connection() as conn:
        await conn.execute("update workspaces set quota_items = 1, quota_batches = 0")
    quota = Amounts(items=100, batches=1, bytes=0)
    await create(db, resource, quota=quota)
    with pytest.raises(QuotaError) as told:
        await create(db, resource, quota=quota)
    assert told.value.details["limit"] == 1
    async with db.connection() as conn:
        await conn.execute("update workspaces set quota_items = 0")
    await create(db, resource, quota=quota)


async def test_other_workspaces_do_not_count(db: Database, resource: Resource) -> None:
    await create(db, resource, quota=_ANY, items=5)
    async with db.transaction() as conn:
        other = await tenants.create_workspace(conn, name="other", environment="test")
        added = Amounts(items=1, batches=1, bytes=1)
        for check in (quotas.enforce, quotas.look):
            await check(conn, workspace_id=other.workspace_id, default=added, added=added)


async def test_large_batches_are_refused_before_they_are_written(
    db: Database, resource: Resource
) -> None:
    await create(db, resource, quota=_ANY, items=5)
    async with db.connection() as conn:
        with pytest.raises(QuotaError):
            await quotas.look(
                conn,
                workspace_id=resource.workspace_id,
                default=Amounts(items=9, batches=0, bytes=0),
                added=Amounts(items=5, batches=1, bytes=0),
            )
