"""Random histories: whatever happens in whatever order, the queue's books stay exact.

One tenant per history, all in one database; after each step everything is recounted.
"""

import asyncio
import os
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast
from uuid import UUID

import msgspec
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

from app.batches import Batch
from app.capacity import Amount, Period
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
#: Limits, more often per minute than over anything else.
FRAMES: list[tuple[Period, bool]] = [
    ("minute", True),
    ("minute", True),
    ("minute", True),
    ("minute", True),
    ("hour", True),
    ("hour", False),
    ("day", True),
    ("day", False),
    ("minute", False),
    ("week", False),
    ("month", False),
    ("lifetime", False),
]


@st.composite
def amounts(draw: st.DrawFn) -> Amount:
    """A limit with at least one bound."""
    period, sliding = draw(st.sampled_from(FRAMES))
    tokens = draw(st.none() | st.integers(40, 400))
    inputs = draw(st.none() | st.integers(30, 200))
    outputs = draw(st.none() | st.integers(30, 200))
    requests = st.integers(1, 10)
    return Amount(
        period=period,
        sliding=sliding,
        requests=draw(st.none() | requests if tokens or inputs or outputs else requests),
        tokens=tokens,
        input_tokens=inputs,
        output_tokens=outputs,
    )


AMOUNTS = amounts()
TEAMS = st.sampled_from([None, "red", "blue"])
BY_TEAM = "metadata:team"

LENGTHS = {
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
    "month": timedelta(days=30),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A limit as the test gave it. ``since``: from when it counts, by the test's own clock."""

    amount: Amount
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """A call as the tables have it: its reservation, or what it was charged."""

    batch_id: UUID
    resource_id: UUID
    claimed_at: datetime
    requests: int
    input_tokens: int
    output_tokens: int


class EveryRule:
    """In place of what lets a history go without some rules: in ten of them, most went without claims."""

    def is_enabled(self, _name: str) -> bool:
        return True


class History(RuleBasedStateMachine):
    """A tenant with three resources, two of them on one connection, and two api keys.

    What is out, what came back late, and what the limits are.
    """

    def __init__(self, runner: asyncio.Runner, db: Database) -> None:
        super().__init__()
        self._rules_strategy.enabled_rules_strategy = st.just(EveryRule())  # pyright: ignore[reportAttributeAccessIssue] - all that it is asked
        self.runner = runner
        self.scene = self.run(Scene.make(db, resources=2))
        self.run(self.scene.add_connection())
        by_team = Amount(period="minute", requests=4, dimension=BY_TEAM)
        self.keys = [self.run(self.scene.api_key(*amounts)) for amounts in ([], [by_team])]
        self.models = [self.run(self.scene.model_scope_id(r)) for r in range(3)]
        self.connections = [
            self.run(
                self.scene.value(
                    "select connection_id from resources where resource_id = %s", resource_id
                )
            )
            for resource_id in self.scene.resource_ids
        ]
        #: How much time has passed by ``pass_time``: the tables' times were moved, ours stay.
        self.passed = timedelta()
        self.bounds = dict[UUID, list[Bound]]()
        self.concurrency = dict[UUID, int | None]()
        # At first; the rules change them.
        self.run(self.set_concurrency(0, 4, connection=True))
        self.run(self.set_concurrency(0, 2, connection=False))
        self.teams = dict[UUID, str | None]()
        self.note_limits(self.keys[1], [by_team])
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
        resources=st.sampled_from([(0,), (1,), (0, 1), (0, 2)]),
        priority=st.sampled_from([0, 0, 5]),
        max_attempts=st.integers(1, 3),
        amounts=st.lists(AMOUNTS, max_size=1),
        key=st.sampled_from([None, 0, 1]),
        team=TEAMS,
    )
    def submit(  # noqa: PLR0917 - the rule's data
        self,
        sizes: list[tuple[int, int]],
        resources: tuple[int, ...],
        priority: int,
        max_attempts: int,
        amounts: list[Amount],
        key: int | None,
        team: str | None,
    ) -> None:
        async def work() -> Batch:
            batch = await self.scene.submit(
                len(sizes),
                resources=resources,
                priority=priority,
                max_attempts=max_attempts,
                amounts=amounts,
                api_key_id=None if key is None else self.keys[key],
                metadata={} if team is None else {"team": team},
            )
            await self.scene.size(batch, sizes)
            return batch

        batch = self.run(work())
        self.batches.append(batch)
        self.teams[batch.batch_id] = team
        if amounts:
            self.note_limits(batch.batch_id, amounts)
        self.submitted += len(sizes)

    @precondition(lambda self: self.batches)
    @rule(
        resource=st.integers(0, 2),
        want=st.integers(1, 8),
        alone=st.booleans(),
        burst_s=st.sampled_from([60, 60, 0.3]),
        slow_start=st.sampled_from([0, 0, 4]),
    )
    def claim(
        self, resource: int, want: int, *, alone: bool, burst_s: float, slow_start: int
    ) -> None:
        claim = self.run(
            self.scene.claim(
                want, resource=resource, alone=alone, burst_s=burst_s, slow_start=slow_start
            )
        )
        assert len(claim.items) <= want
        for item in claim.items:
            key = (item.batch_id, item.seq, item.attempt)
            assert key not in self.given, "an attempt's number was given twice"
            self.given.add(key)
        if claim.items:
            self.run(self.check_calls(resource))
            self.run(self.check_deadlines(claim.items))
        impossible = [item for item in claim.items if item.impossible]
        self.run(self.scene.settle(impossible, Outcome.impossible))
        admitted = [item for item in claim.items if not item.impossible]
        self.out += admitted
        if admitted:
            self.run(self.check_limits(resource, admitted))
            self.run(self.check_windows(resource, admitted))

    async def check_limits(self, resource: int, admitted: Sequence[Item]) -> None:
        """Whoever was just admitted fits every limit of every scope that applies to it."""
        scopes = set[UUID]()
        for batch_id in {item.batch_id for item in admitted}:
            batch = next(b for b in self.batches if b.batch_id == batch_id)
            scopes |= set(await self.scene.scope_ids(batch, resource=resource))
        for use in await self.scene.used(*scopes):
            assert use.requests is None or use.used_requests <= use.requests
            assert use.tokens is None or use.used_tokens <= use.tokens
            assert use.input_tokens is None or use.used_input_tokens <= use.input_tokens
            assert use.output_tokens is None or use.used_output_tokens <= use.output_tokens

    async def check_calls(self, resource: int) -> None:
        """Where something was just admitted, no more calls are out than may be."""
        running = dict(
            await self.scene.rows(
                "select resource_id, count(*)::int from items where workspace_id = %s"
                " and status = 'running' group by 1",
                self.scene.workspace_id,
            )
        )
        resource_id, connection_id = self.scene.resource_ids[resource], self.connections[resource]
        beside = [
            r
            for r, c in zip(self.scene.resource_ids, self.connections, strict=True)
            if c == connection_id
        ]
        bound = self.concurrency.get(resource_id)
        assert bound is None or running[resource_id] <= bound
        bound = self.concurrency.get(connection_id)
        assert bound is None or sum(running.get(r, 0) for r in beside) <= bound

    async def check_deadlines(self, items: Sequence[Item]) -> None:
        """Nothing is claimed after its deadline."""
        for item in items:
            expires_at = (await self.scene.batch(item.batch_id)).expires_at
            assert expires_at is None or item.claimed_at < expires_at

    async def check_windows(self, resource: int, admitted: Sequence[Item]) -> None:
        """The same as check_limits from the calls themselves, by limits that this test remembers."""
        now = admitted[0].claimed_at
        charges = [
            Charge(
                batch_id=batch_id,
                resource_id=resource_id,
                claimed_at=claimed_at,
                requests=requests,
                input_tokens=inputs,
                output_tokens=outputs,
            )
            for batch_id, resource_id, claimed_at, requests, inputs, outputs in await self.scene.rows(
                "select batch_id, resource_id, claimed_at, charged_requests, charged_input_tokens,"
                " charged_output_tokens from attempts where workspace_id = %s union all"
                " select batch_id, resource_id, claimed_at, 1, reserved_input_tokens,"
                " reserved_output_tokens from items where workspace_id = %s and status = 'running'",
                self.scene.workspace_id,
                self.scene.workspace_id,
            )
        ]
        resource_id = self.scene.resource_ids[resource]
        keys = {b.batch_id: b.created_by_api_key_id for b in self.batches}
        on_connection = {
            r
            for r, c in zip(self.scene.resource_ids, self.connections, strict=True)
            if c == self.connections[resource]
        }
        on_model = {
            r
            for r, m in zip(self.scene.resource_ids, self.models, strict=True)
            if m == self.models[resource]
        }
        for batch_id in {item.batch_id for item in admitted}:
            applies = {
                self.connections[resource]: [c for c in charges if c.resource_id in on_connection],
                self.models[resource]: [c for c in charges if c.resource_id in on_model],
                resource_id: [c for c in charges if c.resource_id == resource_id],
                batch_id: [c for c in charges if c.batch_id == batch_id],
            }
            key = keys[batch_id]
            if key is not None:
                applies[key] = [c for c in charges if keys[c.batch_id] == key]
            for scope_id, all_charges in applies.items():
                for bound in self.bounds.get(scope_id, []):
                    used = [
                        c
                        for c in all_charges
                        if c.claimed_at + self.passed >= bound.since
                        and c.claimed_at > counts_from(bound.amount, now)
                        and (
                            bound.amount.dimension is None
                            or self.teams[c.batch_id] == self.teams[batch_id]
                        )
                    ]
                    requests = sum(c.requests for c in used)
                    inputs = sum(c.input_tokens for c in used)
                    outputs = sum(c.output_tokens for c in used)
                    for most, total in zip(
                        bound.amount.bounds,
                        (requests, inputs + outputs, inputs, outputs, 0),
                        strict=True,
                    ):
                        assert most is None or total <= most, (bound, requests, inputs, outputs)

    @precondition(lambda self: self.out)
    @rule(
        number=NUMBERS,
        outcome=OUTCOMES,
        used=SIZES,
        refund=st.booleans(),
        wait_s=st.sampled_from([0, 0, 0, 5, None]),
    )
    def settle(
        self,
        number: int,
        outcome: Outcome,
        used: tuple[int, int],
        *,
        refund: bool,
        wait_s: float | None,
    ) -> None:
        """Outcomes of what is out, of which some was reclaimed long ago."""
        refund = refund and outcome is Outcome.unreachable
        items = self.some(number)
        self.run(self.scene.settle(items, outcome, used=used, wait_s=wait_s, refund=refund))
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

    #: Connections, models, resources and keys, by number.
    SCOPES = 9

    def scope(self, number: int) -> UUID:
        """One of them."""
        return [
            *set(self.connections),
            *set(self.models),
            *self.scene.resource_ids,
            *self.keys,
        ][number]

    def may_have_a_dimension(self, scope_id: UUID) -> bool:
        return scope_id in self.keys

    @rule(
        of=st.integers(0, SCOPES - 1), amounts=st.lists(AMOUNTS, max_size=2), by_team=st.booleans()
    )
    def limit(self, of: int, amounts: list[Amount], *, by_team: bool) -> None:
        scope_id = self.scope(of)
        if by_team and self.may_have_a_dimension(scope_id):
            amounts = [replace(amount, dimension=BY_TEAM) for amount in amounts]
        self.run(self.scene.set_limits(scope_id, *amounts))
        self.note_limits(scope_id, amounts)

    @precondition(lambda self: any(b.batch_id in self.bounds for b in self.batches))
    @rule(number=NUMBERS, amounts=st.lists(AMOUNTS, max_size=1))
    def limit_batch(self, number: int, amounts: list[Amount]) -> None:
        limited = [b.batch_id for b in self.batches if b.batch_id in self.bounds]
        scope_id = limited[number % len(limited)]
        self.run(self.scene.set_limits(scope_id, *amounts))
        self.note_limits(scope_id, amounts)

    def note_limits(self, scope_id: UUID, amounts: Sequence[Amount]) -> None:
        """Two of one account are the tighter of each kind; an account that was there goes on."""
        now = self.run(self.scene.now()) + self.passed
        since = {b.amount.account: b.since for b in self.bounds.get(scope_id, [])}
        self.bounds[scope_id] = [
            Bound(amount=amount, since=since.get(amount.account, now)) for amount in amounts
        ]

    @rule(of=st.integers(0, 2), most=st.none() | st.integers(1, 5), connection=st.booleans())
    def bound_calls(self, of: int, most: int | None, *, connection: bool) -> None:
        self.run(self.set_concurrency(of, most, connection=connection))

    async def set_concurrency(self, of: int, most: int | None, *, connection: bool) -> None:
        scope_id = self.connections[of] if connection else self.scene.resource_ids[of]
        await self.scene.do(
            "update connections set concurrency = %s where connection_id = %s"
            if connection
            else "update resources set concurrency = %s where resource_id = %s",
            most,
            scope_id,
        )
        self.concurrency[scope_id] = most
        # Whoever changes it has a look taken.
        await self.scene.do(
            "update ready set next_at = clock_timestamp() where workspace_id = %s",
            self.scene.workspace_id,
        )

    @rule(seconds=st.sampled_from([20, 62, 62, 3700]))
    def age(self, seconds: int) -> None:
        self.run(self.scene.pass_time(seconds))
        self.passed += timedelta(seconds=seconds)
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
            return msgspec.structs.replace(item, claimed_at=at)

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
        """Every history can be brought to its end, by workers who look only where work is due."""
        scene = self.scene
        for of in range(3):
            for connection in (True, False):
                await self.set_concurrency(of, None, connection=connection)
        for scope_id in self.bounds:
            await scene.set_limits(scope_id)
        await scene.settle(self.out)
        await scene.calm()
        # Rests, and the minute after which a worker looks again where calls at once are bounded.
        await scene.pass_time(70)
        await self.expire_all()
        looks = 0
        while due := [r for r in range(3) if await self.is_due(r)]:
            for resource in due:
                await scene.settle((await scene.claim(resource=resource)).items)
                looks += 1
            assert looks < 20 + 4 * self.submitted, "looks that lead to nothing"
        for batch in self.batches:
            while await scene.mark(batch):
                pass
            assert (await scene.batch(batch.batch_id)).is_finished
        await scene.check_books()

    async def is_due(self, resource: int) -> bool:
        return await self.scene.value(
            "select coalesce(bool_or(next_at <= clock_timestamp()), false) from ready"
            " where resource_id = %s",
            self.scene.resource_ids[resource],
        )

    async def expire_all(self) -> None:
        """Nothing, where there are no deadlines."""


class HistoryWithDeadlines(History):
    """The same with deadlines that come, go and pass, and limits per team of all scopes."""

    def may_have_a_dimension(self, scope_id: UUID) -> bool:
        return scope_id not in self.models

    @precondition(lambda self: self.batches)
    @rule(number=NUMBERS, seconds=st.sampled_from([None, -1, 10, 60, 5000]))
    def deadline(self, number: int, seconds: float | None) -> None:
        self.run(self.scene.set_deadline(self.batches[number % len(self.batches)], seconds))

    @precondition(lambda self: self.batches)
    @rule(number=NUMBERS, resource=st.integers(0, 1), most=st.integers(1, 4), overdue=st.booleans())
    def expire(self, number: int, resource: int, most: int, *, overdue: bool) -> None:
        batch = self.batches[number % len(self.batches)]
        if overdue:
            self.run(self.scene.set_deadline(batch, -1))
        self.run(self.scene.expire(batch, resource=resource, most=most))

    async def expire_all(self) -> None:
        for batch in self.batches:
            for resource in range(3):
                while await self.scene.expire(batch, resource=resource):
                    pass


def counts_from(amount: Amount, now: datetime) -> datetime:
    """What was claimed after this counts."""
    if amount.period == "lifetime":
        return datetime(1, 1, 1, tzinfo=UTC)
    if amount.slides:
        return now - LENGTHS[amount.period]
    at = now.astimezone(UTC)
    begun = at.replace(second=0, microsecond=0)
    if amount.period != "minute":
        begun = begun.replace(minute=0)
    if amount.period in {"day", "week", "month"}:
        begun = begun.replace(hour=0)
    if amount.period == "week":
        begun -= timedelta(days=begun.weekday())
    if amount.period == "month":
        begun = begun.replace(day=1)
    return begun - timedelta(microseconds=1)


def run(
    database: str, machine: type[History], *, examples: int, reached: str, least: set[str]
) -> None:
    """Random histories; ``reached`` is a query for what must have happened in them."""
    with asyncio.Runner() as runner:
        db = Database(database, size=2)
        runner.run(db.__aenter__())
        try:
            run_state_machine_as_test(
                cast("type[History]", lambda: machine(runner, db)),
                settings=settings(
                    max_examples=EXAMPLES or examples,
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
            found = {row[0] for row in conn.execute(reached.encode())}
        # The histories were no dull ones.
        assert found >= least


def test_random_histories_keep_the_books(database: str) -> None:
    run(
        database,
        History,
        examples=10,
        reached="select outcome::text from attempts union select kind::text from limit_scopes",
        least={"answered", "lost", "batch", "value"},
    )


def test_random_histories_with_deadlines_keep_the_books(database: str) -> None:
    run(
        database,
        HistoryWithDeadlines,
        examples=10,
        reached="select ended_reason::text from items",
        least={"answered", "expired"},
    )
