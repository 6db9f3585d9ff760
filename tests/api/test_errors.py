"""Refusals: one envelope for all, with what the limit is and when to come back."""

import asyncio
from uuid import UUID

import pytest

from app import batches
from app.settings import Settings
from tests.api.conftest import Service

ENVELOPE = {"errorMessage", "errorCode", "details"}


async def test_a_wrong_method_is_told_with_the_right_ones(service: Service) -> None:
    answer = await service.http.delete(service.batches)
    assert (answer.status_code, answer.json()["errorCode"]) == (405, "405")
    assert set(answer.headers["allow"].replace(",", "").split()) >= {"GET", "POST"}
    assert answer.json().keys() == ENVELOPE


async def test_another_media_type_is_refused_in_the_envelope(service: Service) -> None:
    """Or read as what it is: JSON, whatever it is called. Never a 5xx."""
    for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "nonsense"):
        for method, path in (
            ("POST", service.batches),
            ("POST", f"/v1/ai-connection/{service.tenant}"),
            ("PATCH", f"/v1/ai-connection/{service.tenant}/{service.connection_id}"),
        ):
            answer = await service.http.request(
                method, path, content=b"<a/>", headers={"content-type": kind}
            )
            assert answer.status_code in (400, 415), (kind, path)
            assert answer.json().keys() == ENVELOPE


async def test_a_body_that_is_too_large_names_the_limit(service: Service) -> None:
    path = f"/v1/ai-connection/{service.tenant}/{service.connection_id}"
    answer = await service.http.patch(path, json={"description": "x" * 1024 * 1024})
    assert (answer.status_code, answer.json()["errorCode"]) == (413, "REQUEST_TOO_LARGE")
    assert "1,048,576 bytes" in answer.json()["errorMessage"]


class TestQuota:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(port=0, quota_items=3)

    async def test_a_full_queue_is_a_429_until_something_ends(self, lone_service: Service) -> None:
        body = {"type": "ASYNC", "items": [lone_service.item()] * 2}
        key = {"idempotency-key": "first"}
        first = await lone_service.http.post(lone_service.batches, json=body, headers=key)
        assert first.status_code == 201
        refused = await lone_service.http.post(lone_service.batches, json=body)
        told = refused.json()
        assert (refused.status_code, told["errorCode"]) == (429, "QUOTA_EXCEEDED")
        assert refused.headers["retry-after"] == "30"
        assert told["details"] == {"quota": "items", "limit": 3, "used": 2, "asked": 2}
        assert "SLUICE_QUOTA_ITEMS" in told["errorMessage"]
        # A repeat of what was accepted is no new batch.
        again = await lone_service.http.post(lone_service.batches, json=body, headers=key)
        assert again.json()["batchId"] == first.json()["batchId"]
        alone = await lone_service.http.post(
            lone_service.batches, json=body | {"items": [lone_service.item()] * 4}
        )
        assert (alone.status_code, alone.json()["errorCode"]) == (413, "QUOTA_EXCEEDED")
        await lone_service.work()
        assert (await lone_service.http.post(lone_service.batches, json=body)).status_code == 201

    async def test_requests_at_once_never_exceed_it(self, lone_service: Service) -> None:
        body = {"type": "ASYNC", "items": [lone_service.item()]}
        answers = await asyncio.gather(
            *[lone_service.http.post(lone_service.batches, json=body) for _ in range(10)]
        )
        assert sorted(a.status_code for a in answers) == [201] * 3 + [429] * 7
        assert await lone_service.added() == (3, 3)


async def test_a_database_that_is_blocked_is_a_503_in_time(lone_service: Service) -> None:
    """All connections are taken: a request waits for one a bounded time, then is told to come back."""
    pool = lone_service.db._pool  # pyright: ignore[reportPrivateUsage]
    pool.timeout = 0.3
    held = [await pool.getconn() for _ in range(pool.max_size)]
    try:
        async with asyncio.timeout(5):
            created, read = await asyncio.gather(
                lone_service.http.post(lone_service.batches, json={}),
                lone_service.http.get(lone_service.batches),
            )
        for answer in (created, read):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert answer.json()["errorCode"] == "DATABASE_UNAVAILABLE"
    finally:
        for conn in held:
            await pool.putconn(conn)
    pool.timeout = 10
    batch = await lone_service.create()
    async with lone_service.db.connection() as conn:
        assert await batches.resource_ids(
            conn,
            workspace_id=lone_service.environment.workspace_id,
            batch_id=UUID(batch["batchId"]),
        )
