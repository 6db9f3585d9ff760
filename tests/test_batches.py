"""Creating batches: all or nothing, to the letter, once per idempotency key; and reading them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import batches, intake, items
from app.batches import Batch
from app.db import Connection, Database
from app.errors import ConflictError, ValidationError
from app.ids import uuid7
from app.intake import Ingest, NewBatch, NewItem
from app.queue import Outcome
from app.resources import get as get_resource
from tests.conftest import cloned
from tests.scene import BODY, Scene, until_blocked


@pytest.fixture(scope="module")
async def world(cluster: str, template: str) -> AsyncIterator[Database]:
    """One database for this file; a tenant for every test."""
    with cloned(cluster, template) as url:
        async with Database(url, size=6) as db:
            yield db


@pytest.fixture
async def scene(world: Database) -> AsyncIterator[Scene]:
    scene = await Scene.make(world, resources=2)
    yield scene
    await scene.check_books()


async def ingest(
    scene: Scene,
    items: Sequence[NewItem],
    *,
    parts: int = 1,
    conn: Connection | None = None,
    idempotency_key: str | None = None,
    request_hash: bytes | None = None,
    **options: Any,  # noqa: ANN401 - Ingest's
) -> UUID:
    """Create a batch of these items, given in so many parts."""
    batch = NewBatch(
        workspace_id=scene.workspace_id,
        environment_id=scene.environment_id,
        type="async",
        idempotency_key=idempotency_key,
        request_hash=request_hash,
    )
    if conn is None:
        async with scene.db.connection() as own:
            await intake.prepare_day(own, batch)
        async with scene.db.transaction() as own:
            return await ingest(
                scene,
                items,
                parts=parts,
                conn=own,
                idempotency_key=idempotency_key,
                request_hash=request_hash,
                **options,
            )
    resources = {
        resource_id: found
        for resource_id in scene.resource_ids
        if (
            found := await get_resource(
                conn,
                workspace_id=scene.workspace_id,
                environment_id=scene.environment_id,
                resource_id=resource_id,
            )
        )
    }
    work = Ingest(conn, batch, resources, **options)
    size = -(-len(items) // parts) or 1
    for start in range(0, len(items), size):
        await work.add(items[start : start + size])
    return await work.finish()


def item(scene: Scene, body: bytes = BODY, **more: Any) -> NewItem:  # noqa: ANN401 - NewItem's
    return NewItem(resource_id=scene.resource_id, body=body, **more)


async def kept(scene: Scene) -> int:
    """How many rows of any kind a tenant's batches have."""
    return await scene.value(
        "select (select count(*) from batches where workspace_id = %s)"
        " + (select count(*) from items where workspace_id = %s)"
        " + (select count(*) from item_requests where workspace_id = %s)"
        " + (select count(*) from flows where workspace_id = %s)"
        " + (select count(*) from events where workspace_id = %s)",
        *[scene.workspace_id] * 5,
    )


# What is refused -----------------------------------------------------------------------------------


async def test_problems_are_named_together_and_nothing_is_kept(scene: Scene) -> None:
    bodies = [BODY, b"[]", BODY, b"{", b"{}"]
    with pytest.raises(ValidationError) as refusal:
        await ingest(scene, [item(scene, body) for body in bodies], parts=5)
    assert [p.path for p in refusal.value.problems] == [
        "items[1].request",
        "items[3].request",
        "items[4].request",
    ]
    assert await kept(scene) == 0


async def test_a_part_that_fails_while_another_is_copied_leaves_a_whole_connection(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is ended before the caller's transaction is, whoever was first."""
    monkeypatch.setattr(Ingest, "PART", 50)
    prepare = Ingest._prepare  # pyright: ignore[reportPrivateUsage] - a test may look inside

    def broken(self: Ingest, items: Sequence[NewItem], first_seq: int) -> Any:  # noqa: ANN401 - a private one
        if first_seq:
            raise MemoryError
        return prepare(self, items, first_seq)

    async with scene.db.connection() as conn:
        with monkeypatch.context() as patch:
            patch.setattr(Ingest, "_prepare", broken)
            with pytest.raises(MemoryError):
                async with conn.transaction():
                    await ingest(scene, [item(scene)] * 200, conn=conn)
        assert await kept(scene) == 0
        async with conn.transaction():
            await ingest(scene, [item(scene)] * 200, conn=conn)
    assert await kept(scene) == 2 * 200 + 3  # and batch, flow, event


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_parts_change_nothing_of_what_is_written(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(Ingest, "PART", size)
    bodies = [b'{"messages":[],"n":%d}' % n for n in range(1, 31)]
    await ingest(scene, [item(scene, body) for body in bodies], parts=2)
    written = await scene.value(
        "select array_agg(body::text order by seq) from item_requests where workspace_id = %s",
        scene.workspace_id,
    )
    assert written == [body.decode() for body in bodies]


@pytest.mark.parametrize("parts", [1, 3])
async def test_the_first_hundred_problems_are_named(scene: Scene, parts: int) -> None:
    with pytest.raises(ValidationError) as refusal:
        await ingest(scene, [item(scene, b"[]")] * 150, parts=parts)
    assert [p.path for p in refusal.value.problems] == [f"items[{n}].request" for n in range(100)]
    assert await kept(scene) == 0


async def test_an_empty_batch_is_refused(scene: Scene) -> None:
    with pytest.raises(ValidationError, match="at least one item"):
        await ingest(scene, [])


async def test_too_many_items_are_refused(scene: Scene) -> None:
    with pytest.raises(ValidationError, match="more than 2 items"):
        await ingest(scene, [item(scene)] * 3, parts=3, most_items=2)
    assert await kept(scene) == 0
    await ingest(scene, [item(scene)] * 2, most_items=2)


async def test_a_body_too_large_is_refused(scene: Scene) -> None:
    with pytest.raises(ValidationError, match=r"items\[1\].request: is .* bytes long"):
        await ingest(scene, [item(scene), item(scene, BODY + b" " * 100)], most_item_bytes=100)


async def test_a_prompt_larger_than_a_limit_is_refused_and_one_that_fits_is_not(
    scene: Scene,
) -> None:
    await scene.limit(tokens=100)
    long = json.dumps({"messages": [{"role": "user", "content": "word " * 200}]}).encode()
    with pytest.raises(ValidationError, match=r"items\[1\].*larger than the limit of 100 tokens"):
        await ingest(scene, [item(scene), item(scene, long)])
    assert await kept(scene) == 0
    # Its answer may be longer than the limit: the reservation is clamped.
    await ingest(scene, [item(scene)])


async def test_the_connections_limit_refuses_a_prompt_too(scene: Scene) -> None:
    await scene.limit(tokens=5, scope_id=scene.connection_id)
    with pytest.raises(ValidationError, match="larger than the limit of 5 tokens"):
        await ingest(scene, [item(scene)])


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        '{"a": "ü"}'.encode("utf-16"),
        '{"a": "ü"}'.encode("utf-8-sig"),
        '{"a": "ü"}'.encode("latin-1"),
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "tab\there"}',
        b'{"a": "nul\x00here"}',
        b'{"a": 1} {"b": 2}',
        b'{"a": 01}',
        b"null",
        b'"text"',
        b"",
        b'{"a":' * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_what_postgres_would_not_take_as_json_is_a_problem_of_the_item(
    scene: Scene, body: bytes
) -> None:
    """Not an error of the database, which would be a 500 without a word about the item."""
    with pytest.raises(ValidationError, match=r"items\[1\].request") as refusal:
        await ingest(scene, [item(scene), item(scene, body)])
    assert len(refusal.value.problems) == 1


# What is kept --------------------------------------------------------------------------------------

ODD = [
    rb'{"a":"tab \t newline \n return \r backslash \\ slash \/ quote \""}',
    rb'{"a":"nul \u0000 lone \ud800 pair \ud83d\ude00"}',
    rb'{"a":"\\.", "b":"\\N"}',
    '{"ü€😀":"\u2028 \u00a0 \ufeff"}'.encode(),
    b'{"b":1,"a":2,"b":3}',
    b'{"n":123456789012345678901234567890.123456789,"e":1E400,"z":-0.0}',
    b' {\n\t"a" :\r\n [ 1 , 2 ]\n}\n',
    b'{"":""}',
]


async def test_requests_are_kept_to_the_letter(scene: Scene) -> None:
    batch_id = await ingest(scene, [item(scene, body) for body in ODD], parts=3)
    read = await scene.items(await scene.batch(batch_id))
    assert [i.request.encode() for i in read] == ODD


async def test_custom_ids_are_kept_to_the_letter(scene: Scene) -> None:
    names = ["\\N", "\\.", "", "tab\there", "line\nbreak\r", "back\\slash\\", "ü😀", None]
    batch_id = await ingest(scene, [item(scene, custom_id=name) for name in names])
    assert [i.custom_id for i in await scene.items(await scene.batch(batch_id))] == names


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON, min_size=1, max_size=4)


def test_whatever_is_accepted_comes_back_to_the_letter(database: str) -> None:
    with asyncio.Runner() as runner:
        db = Database(database, size=2)
        runner.run(db.__aenter__())
        scene = runner.run(Scene.make(db))

        async def there_and_back(bodies: list[bytes]) -> None:
            batch_id = await ingest(scene, [item(scene, body) for body in bodies])
            read = await scene.items(await scene.batch(batch_id))
            assert [i.request.encode() for i in read] == bodies

        @given(st.lists(OBJECTS, min_size=1, max_size=4), st.booleans())
        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        def check(objects: list[dict[str, object]], ascii_only: bool) -> None:  # noqa: FBT001
            texts = [json.dumps(o, ensure_ascii=ascii_only) for o in objects]
            runner.run(there_and_back([t.encode(errors="replace") for t in texts]))

        try:
            check()
        finally:
            runner.run(db.__aexit__(None, None, None))


async def test_items_are_numbered_in_input_order_over_parts_and_resources(scene: Scene) -> None:
    bodies = [json.dumps({"n": n}).encode() for n in range(7)]
    batch_id = await ingest(
        scene,
        [
            NewItem(resource_id=scene.resource_ids[n % 2], body=body, max_attempts=n % 3 or None)
            for n, body in enumerate(bodies)
        ],
        parts=3,
    )
    batch = await scene.batch(batch_id)
    read = await scene.items(batch)
    assert [(i.seq, i.request.encode()) for i in read] == list(enumerate(bodies))
    assert [i.resource_id for i in read] == [scene.resource_ids[n % 2] for n in range(7)]
    assert (batch.total_items, batch.pending, batch.status) == (7, 7, "pending")
    assert batch.estimated_input_tokens == sum(i.estimated_input_tokens for i in read) > 0
    assert await scene.rows(
        "select seq, max_attempts from items where batch_id = %s order by seq", batch_id
    ) == [(n, n % 3 or 5) for n in range(7)]
    async with scene.db.connection() as conn:
        found = await batches.resource_ids(conn, workspace_id=scene.workspace_id, batch_id=batch_id)
    assert sorted(found) == sorted(scene.resource_ids)


async def test_twenty_thousand_items_take_seconds(world: Database) -> None:
    scene = await Scene.make(world)
    begun = time.monotonic()
    batch = await scene.submit(20_000)
    assert time.monotonic() - begun < 15
    assert (batch.total_items, batch.pending) == (20_000, 20_000)
    assert [e.kind for e in await scene.events(batch)] == ["batch-created"]
    # A progress read and a cancel do not depend on their number; marking is by chunks.
    await scene.cancel(batch)
    begun = time.monotonic()
    chunks = 0
    while await scene.mark(batch):
        chunks += 1
    assert chunks == 10
    assert time.monotonic() - begun < 15


# Idempotency ---------------------------------------------------------------------------------------


async def create_once(scene: Scene, conn: Connection, key: str, *, content: bytes = b"1") -> UUID:
    """What the API does: look the key up, and create only when there is none."""
    known = await intake.replay(
        conn,
        workspace_id=scene.workspace_id,
        environment_id=scene.environment_id,
        idempotency_key=key,
        request_hash=content,
    )
    if known is not None:
        return known
    return await ingest(scene, [item(scene)], conn=conn, idempotency_key=key, request_hash=content)


async def test_a_repeated_creation_returns_the_first_batch(scene: Scene) -> None:
    made = list[UUID]()
    for _ in range(3):
        async with scene.db.transaction() as conn:
            made.append(await create_once(scene, conn, "k"))
    assert len(set(made)) == 1
    assert await kept(scene) == 5


async def test_a_key_used_for_another_request_is_a_conflict(scene: Scene) -> None:
    async with scene.db.transaction() as conn:
        first = await create_once(scene, conn, "k")
    async with scene.db.transaction() as conn:
        with pytest.raises(ConflictError) as refusal:
            await create_once(scene, conn, "k", content=b"2")
    assert refusal.value.code == "IDEMPOTENCY_MISMATCH"
    assert refusal.value.details == {"batchId": str(first)}


async def test_keys_are_a_tenants_own(scene: Scene) -> None:
    other = await Scene.make(scene.db)
    async with scene.db.transaction() as conn:
        first = await create_once(scene, conn, "k")
    async with scene.db.transaction() as conn:
        assert await create_once(other, conn, "k") != first


@pytest.mark.parametrize("first_commits", [True, False])
async def test_a_concurrent_repetition_waits_for_the_first(
    scene: Scene, *, first_commits: bool
) -> None:
    async with scene.session() as one, scene.session() as two:
        first = await create_once(scene, one, "k")
        again = asyncio.create_task(create_once(scene, two, "k"))
        assert await until_blocked(scene, two, again)
        await (one.commit() if first_commits else one.rollback())
        second = await asyncio.wait_for(again, 10)
        await two.commit()
    assert (second == first) is first_commits
    assert await kept(scene) == 5


# Reading -------------------------------------------------------------------------------------------


async def test_batches_are_listed_newest_first_by_state_and_page(scene: Scene) -> None:
    made = [await scene.submit(1, resource=n % 2) for n in range(4)]
    await scene.cancel(made[1])

    async def page(**options: Any) -> list[Batch]:  # noqa: ANN401 - page's
        async with scene.db.connection() as conn:
            return await batches.page(
                conn,
                workspace_id=scene.workspace_id,
                environment_id=scene.environment_id,
                **cast("Any", {"before": None, "only": batches.Only(), "most": 10} | options),
            )

    newest = [b.batch_id for b in reversed(made)]
    assert [b.batch_id for b in await page()] == newest
    assert [b.batch_id for b in await page(most=2)] == newest[:2]
    assert [b.batch_id for b in await page(before=newest[1])] == newest[2:]
    cancelled = batches.Only(statuses=["cancelled"])
    assert [b.batch_id for b in await page(only=cancelled)] == [made[1].batch_id]


async def test_items_are_read_from_a_number_on_by_state_and_by_number(scene: Scene) -> None:
    batch = await scene.submit(6)
    await scene.settle((await scene.claim(2)).items)
    async with scene.db.connection() as conn:
        later = await items.seqs(conn, batch=batch, start=4)
        before = await items.seqs(conn, batch=batch, start=4, back=True, most=3)
        done = await items.seqs(conn, batch=batch, only=items.Only(statuses=["completed"]))
        last = await items.seqs(conn, batch=batch, only=items.Only(statuses=["pending"]), back=True)
        some = await items.numbered(conn, batch=batch, seqs=[5, 0])
    assert (later, before, done, last) == ([4, 5], [3, 2, 1], [0, 1], [5, 4, 3, 2])
    assert [(i.seq, i.status) for i in some] == [(0, "completed"), (5, "pending")]


async def test_items_cancelled_are_found_by_that_state_before_their_rows_say_so(
    scene: Scene,
) -> None:
    batch = await scene.submit(3)
    await scene.settle((await scene.claim(1)).items)
    await scene.cancel(batch)
    async with scene.db.connection() as conn:
        cancelled = items.Only(statuses=["cancelled"])
        assert await items.seqs(conn, batch=batch, only=cancelled) == [1, 2]
        pending = items.Only(statuses=["pending"])
        assert await items.seqs(conn, batch=batch, only=pending) == []
        assert await items.first_open(conn, batch=batch) is None


async def test_results_stream_every_item_in_input_order(scene: Scene) -> None:
    batch = await scene.submit(1200)
    claim = await scene.claim(3)
    await scene.settle(claim.items[:2])
    await scene.settle(claim.items[2:], Outcome.rejected)
    async with scene.db.transaction() as conn:
        read = [
            result
            async for result in items.results(
                conn,
                workspace_id=scene.workspace_id,
                batch_id=batch.batch_id,
                batch_day=batch.batch_day,
            )
        ]
    assert [r.seq for r in read] == list(range(1200))
    assert [(r.status, r.error_code) for r in read[:4]] == [
        ("completed", None),
        ("completed", None),
        ("failed", "rejected"),
        ("pending", None),
    ]


async def test_a_batch_is_only_its_environments(scene: Scene) -> None:
    batch = await scene.submit(1)
    async with scene.db.connection() as conn:
        assert (
            await batches.get(
                conn,
                workspace_id=scene.workspace_id,
                environment_id=uuid7(),
                batch_id=batch.batch_id,
            )
            is None
        )
