"""Random histories: whatever happens in whatever order, the queue's books stay exact.

One tenant per history, all in one database; after each step everything is recounted.
"""

import asyncio
import os
from collections.abc import Awaitable
from typing import Any, TypeVar, cast
from uuid import UUID

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app import capacity
from app.batches import Batch
from app.db import Database
from app.queue import Item, Outcome
from tests.scene import Scene

#: Always the same few histories, or so many new ones: SLUICE_TEST_EXAMPLES=1000 for a night.
EXAMPLES = int(os.environ.get("SLUICE_TEST_EXAMPLES", "0"))

T = TypeVar("T")
Key = tuple[UUID, int]

NUMBERS = st.integers(0, 2**16 - 1)
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))
#: Of every outcome so many: histories in which nothing succeeds are dull.
OUTCOMES = st.sampled_from(
    [*[Outcome.answered] * 4, *(o for o in Outcome if o is not Outcome.impossible)]
)


class History(RuleBasedStateMachine):
    """A tenant with two resources on a connection; what is out, and what came back late."""

    def __init__(self, runner: asyncio.Runner, db: Database) -> None:
        super().__init__()
        self.runner = runner
        self.scene = self.run(Scene.make(db, resources=2))
        self.batches: list[Batch] = []
        self.submitted = 0
        #: Attempts that are out; those among them that were reclaimed report late or never.
        self.out: list[Item] = []
        self.settled: list[tuple[Item, Outcome]] = []
        self.given = set[tuple[UUID, int, int]]()
        self.seen = dict[Key, tuple[str, int]]()
        self.redriven = False

    def run(self, work: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await work

        return self.runner.run(awaited())

    def some(self, number: int) -> list[Item]:
        """A part of what is out, taken away from there."""
        part = [item for n, item in enumerate(self.out) if number >> (n % 16) & 1]
        self.out = [item for item in self.out if item not in part]
        return part

    @rule(
        sizes=st.lists(SIZES, min_size=1, max_size=6),
        resources=st.sampled_from([(0,), (1,), (0, 1)]),
        priority=st.sampled_from([0, 0, 5]),
        max_attempts=st.integers(1, 3),
    )
    def submit(
        self,
        sizes: list[tuple[int, int]],
        resources: tuple[int, ...],
        priority: int,
        max_attempts: int,
    ) -> None:
        async def work() -> Batch:
            batch = await self.scene.submit(
                len(sizes), resources=resources, priority=priority, max_attempts=max_attempts
            )
            await self.scene.size(batch, sizes)
            return batch

        self.batches.append(self.run(work()))
        self.submitted += len(sizes)

    @precondition(lambda self: self.batches)
    @rule(resource=st.integers(0, 1), want=st.integers(1, 8), alone=st.booleans())
    def claim(self, resource: int, want: int, *, alone: bool) -> None:
        claim = self.run(self.scene.claim(want, resource=resource, alone=alone))
        assert len(claim.items) <= want
        for item in claim.items:
            key = (item.batch_id, item.seq, item.attempt)
            assert key not in self.given, "an attempt's number was given twice"
            self.given.add(key)
        impossible = [item for item in claim.items if item.impossible]
        self.run(self.scene.settle(impossible, Outcome.impossible))
        self.out += [item for item in claim.items if not item.impossible]
        if len(claim.items) > len(impossible):
            self.check_limits(resource)

    def check_limits(self, resource: int) -> None:
        """Whoever was just admitted fits every limit."""

        async def used() -> list[capacity.LimitUse]:
            async with self.scene.db.connection() as conn:
                return await capacity.used(
                    conn,
                    workspace_id=self.scene.workspace_id,
                    scope_ids=[self.scene.connection_id, self.scene.resource_ids[resource]],
                    guard_s=1,
                )

        for limit in self.run(used()):
            assert limit.requests is None or limit.used_requests <= limit.requests
            assert limit.tokens is None or limit.used_tokens <= limit.tokens

    @precondition(lambda self: self.out)
    @rule(number=NUMBERS, outcome=OUTCOMES, used=SIZES, refund=st.booleans())
    def settle(self, number: int, outcome: Outcome, used: tuple[int, int], *, refund: bool) -> None:
        """Outcomes of what is out, of which some was reclaimed long ago."""
        refund = refund and outcome is Outcome.unreachable
        items = self.some(number)
        self.run(self.scene.settle(items, outcome, used=used, wait_s=0, refund=refund))
        self.settled += [(item, outcome) for item in items]

    @precondition(lambda self: self.settled)
    @rule(number=NUMBERS)
    def settle_again(self, number: int) -> None:
        """A repeated settlement changes nothing, however late."""
        item, outcome = self.settled[number % len(self.settled)]
        before = self.run(self.everything())
        [again] = self.run(self.scene.settle([item], outcome, wait_s=0))
        assert (again.settled, again.becomes) == (True, None)
        assert self.run(self.everything()) == before

    async def everything(self) -> list[list[tuple[Any, ...]]]:
        return [
            await self.scene.rows(
                f"select t::text from {table} t where workspace_id = %s order by 1",  # noqa: S608
                self.scene.workspace_id,
            )
            for table in ("items", "item_results", "attempts", "events", "ledger", "flows")
        ]

    @precondition(lambda self: self.out)
    @rule(number=NUMBERS, alone=st.booleans(), forget=st.booleans())
    def reclaim(self, number: int, *, alone: bool, forget: bool) -> None:
        """A worker is given up: it never reports, or late."""
        items = self.some(number)
        by_batch = dict[UUID, list[Item]]()
        for item in items:
            by_batch.setdefault(item.batch_id, []).append(item)
        for part in by_batch.values():
            self.run(self.scene.reclaim(part, alone=alone))
        if not forget:
            self.out += items

    @precondition(lambda self: self.batches)
    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        self.run(self.scene.cancel(self.batches[number % len(self.batches)]))

    @precondition(lambda self: self.batches)
    @rule(number=NUMBERS, most=st.integers(1, 4))
    def mark(self, number: int, most: int) -> None:
        self.run(self.scene.mark(self.batches[number % len(self.batches)], most=most))

    @precondition(lambda self: self.batches)
    @rule(number=NUMBERS, most=st.integers(1, 4))
    def redrive(self, number: int, most: int) -> None:
        self.redriven = True
        self.run(self.scene.redrive(self.batches[number % len(self.batches)], most=most))

    @rule(
        of=st.sampled_from([0, 1, None]),
        requests=st.none() | st.integers(1, 10),
        tokens=st.none() | st.integers(40, 400),
    )
    def limit(self, of: int | None, requests: int | None, tokens: int | None) -> None:
        scope_id = self.scene.connection_id if of is None else self.scene.resource_ids[of]
        self.run(self.scene.limit(requests=requests, tokens=tokens, scope_id=scope_id))

    @rule(seconds=st.sampled_from([20, 62]))
    def age(self, seconds: int) -> None:
        shift = self.scene.age(seconds)
        self.run(shift)
        # What workers hold in memory is as old as what the tables say.
        self.run(self.refresh())

    async def refresh(self) -> None:
        """Take the claims' times from the tables, which ``age`` has moved."""
        times = {
            (batch_id, seq, attempt): at
            for batch_id, seq, attempt, at in await self.scene.rows(
                "select batch_id, seq, attempt, claimed_at from items where workspace_id = %s and"
                " claimed_at is not null union all"
                " select batch_id, seq, attempt, claimed_at from attempts where workspace_id = %s",
                self.scene.workspace_id,
                self.scene.workspace_id,
            )
        }

        def moved(item: Item) -> Item:
            at = times.get((item.batch_id, item.seq, item.attempt), item.claimed_at)
            return Item(
                **{name: getattr(item, name) for name in Item.__slots__ if name != "claimed_at"},
                claimed_at=at,
            )

        self.out = [moved(item) for item in self.out]
        self.settled = [(moved(item), outcome) for item, outcome in self.settled]

    @invariant()
    def the_books_are_exact(self) -> None:
        self.run(self.scene.check_books())

    @invariant()
    def states_only_go_forward(self) -> None:
        rows = self.run(
            self.scene.rows(
                "select batch_id, seq, status::text, attempt from items where workspace_id = %s",
                self.scene.workspace_id,
            )
        )
        assert len(rows) == self.submitted, "an item is lost"
        for batch_id, seq, status, attempt in rows:
            was, before = self.seen.get((batch_id, seq), ("pending", 0))
            assert attempt >= before, "an attempt's number was lowered"
            if was in {"completed", "cancelled"} or (was == "failed" and not self.redriven):
                assert status == was, f"{was} became {status}"
            self.seen[batch_id, seq] = (status, attempt)
        self.redriven = False

    @invariant()
    def every_end_has_one_result(self) -> None:
        wrong = self.run(
            self.scene.rows(
                "select i.status::text, i.attempt, r.attempt from items i left join item_results r"
                " using (workspace_id, batch_day, batch_id, seq) where i.workspace_id = %s"
                " and (i.status in ('completed', 'failed')) <> (r.seq is not null)",
                self.scene.workspace_id,
            )
        )
        assert wrong == []

    def teardown(self) -> None:
        self.run(self.end())

    async def end(self) -> None:
        """Every history can be brought to its end."""
        scene = self.scene
        await scene.calm()
        for scope_id in (scene.connection_id, *scene.resource_ids):
            await scene.limit(scope_id=scope_id)
        await scene.settle(self.out)
        for resource in (0, 1):
            while items := (await scene.claim(resource=resource)).items:
                await scene.settle(items)
        for batch in self.batches:
            while await scene.mark(batch):
                pass
            assert (await scene.batch(batch.batch_id)).is_finished
        await scene.check_books()


def test_random_histories_keep_the_books(database: str) -> None:
    with asyncio.Runner() as runner:
        db = Database(database, size=2)
        runner.run(db.__aenter__())
        try:
            run_state_machine_as_test(
                cast("type[History]", lambda: History(runner, db)),
                settings=settings(
                    max_examples=EXAMPLES or 25,
                    stateful_step_count=30,
                    deadline=None,
                    derandomize=not EXAMPLES,
                    database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                    phases=[Phase.generate],
                ),
            )
        finally:
            runner.run(db.__aexit__(None, None, None))
        with psycopg.connect(database) as conn:
            reached = {
                row[0] for row in conn.execute("select distinct outcome::text from attempts")
            }
        # The histories were no dull ones.
        assert reached >= {"answered", "lost"}
