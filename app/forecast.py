"""What a batch waits for, and when it will be done.

**The estimate** is that of a fluid. What is left of a batch is an amount of requests, tokens, input
tokens and output tokens: items that still wait, times the mean of what is known of their size. For
every limit that binds it, and every kind that the limit bounds, three things decide.

1. *Whose turn comes first.* Of the amount n of the batch itself, with weight w, and of the amounts n_i
   of others that use the same limit, this much is served up to the batch's last item:

       V = n + Σ n_i (higher priority) + Σ min(n_i, n · w_i / w) (same priority)

   which is where weighted fair sharing stands when the batch is done. Lower priorities are left out
   (they get a twentieth), and so is the urgency that weights gain towards a deadline.

2. *When the limit has let V through* (``Bound.clears_in``), with Q per period P and U in use:

   - a limit per minute is spent evenly: V · 60 s / Q;
   - another sliding one leaves Q - U at once and gets U back evenly over P, and then the same again;
   - one of the calendar leaves Q - U now, and Q whenever a period begins;
   - a lifetime leaves Q - U and nothing more.

3. *How fast it really goes.* Where claimable work was there for ten seconds or more and no limit held
   it up, V is also divided by the requests per second that the model took meanwhile, over a minute at
   most: the calls at once, the worker or the provider may be slower than every limit.

The latest of all these times, after the rest that a provider asked for, is the estimate. It says when
the last call begins; how long that call takes is not known. There is none (None) while the batch is
paused, while no worker lives, and where neither a limit nor a measured speed says anything.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from app import capacity, prices
from app.batches import Batch
from app.capacity import Amount, Kind, NamedScope, Period, Usage
from app.db import Connection, Query
from app.intake import Appraisal
from app.prices import Expected
from app.queue import WaitReason

Reason = Literal["capacity", "pace", "concurrency", "cooldown", "retry", "paused", "worker"]

_MINUTE_S = 60.0
#: Shorter than this, what was claimed says more about the beginning than about the speed.
_MEASURED_S = 10.0
#: Longer than this is never: dates end.
_MOST_S = 100 * 366 * 86_400.0
_PERIOD_S: Mapping[Period, float] = {
    "minute": 60.0,
    "hour": 3600.0,
    "day": 86_400.0,
    "week": 7 * 86_400.0,
    "month": 30 * 86_400.0,
}


# The fluid ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What waits of a flow: so many items, and the tokens of all of them together."""

    items: float
    input_tokens: float
    output_tokens: float
    scope_ids: frozenset[UUID]
    priority: int = 0
    weight: float = 1
    blocked_s: float = 0

    def amount(self, kind: Kind) -> float:
        """How much of a kind that is."""
        match kind:
            case "requests":
                return self.items
            case "tokens":
                return self.input_tokens + self.output_tokens
            case "input_tokens":
                return self.input_tokens
            case "output_tokens":
                return self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One kind of a limit: ``most`` per period, ``used`` of it. ``is_paced``: spent evenly.

    ``resets_in_s``: until the calendar's period ends. ``of``: where the limit itself is described.
    """

    scope_id: UUID
    period: Period
    kind: Kind
    most: float
    used: float
    is_sliding: bool
    is_paced: bool = False
    resets_in_s: float = 0
    of: "LimitOf | None" = None

    def clears_in(self, amount: float) -> float:
        """Seconds until so much was let through; infinity: never."""
        free = max(self.most - self.used, 0)
        if self.is_paced:
            return amount * _MINUTE_S / self.most
        if amount <= free:
            return 0
        if self.period == "lifetime":
            return math.inf
        length = _PERIOD_S[self.period]
        if not self.is_sliding:
            return self.resets_in_s + (math.ceil((amount - free) / self.most) - 1) * length
        rounds = math.ceil(amount / self.most) - 1
        rest = amount - rounds * self.most
        late = 0 if rest <= free else (rest - free) / (self.most - free) * length
        return rounds * length + late


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOf:
    """A limit for people: what it counts, and of which scope."""

    scope: NamedScope
    period: Period
    is_sliding: bool
    source: Literal["given", "observed"]
    kind: Kind
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """When work is done: in ``seconds`` (infinity: never), as ``bound`` has it.

    ``bound`` is None where the measured speed decides, or the rest that a provider asked for.
    """

    seconds: float
    bound: Bound | None


def ahead(mine: Sequence[Work], others: Iterable[Work], kind: Kind) -> float:
    """How much of a kind others are served before the last of ``mine`` is."""
    own = sum(work.amount(kind) for work in mine)
    if not mine:
        return 0
    priority, weight = mine[0].priority, mine[0].weight
    total = 0.0
    for other in others:
        if other.priority > priority:
            total += other.amount(kind)
        elif other.priority == priority:
            total += min(other.amount(kind), own * other.weight / weight)
    return total


def finish(
    mine: Sequence[Work],
    others: Sequence[Work],
    bounds: Sequence[Bound],
    speeds: Mapping[UUID, float],
) -> Finish | None:
    """When the last of ``mine``, the flows of one batch, is begun; None: nothing tells.

    ``speeds``: requests per second that were measured, by the scope of their model.
    """
    found = Finish(seconds=0, bound=None)
    told: set[int] = set()
    for bound in bounds:
        using = [n for n, work in enumerate(mine) if bound.scope_id in work.scope_ids]
        own = [mine[n] for n in using]
        amount = sum(work.amount(bound.kind) for work in own)
        if not amount:
            continue
        rivals = [other for other in others if bound.scope_id in other.scope_ids]
        seconds = bound.clears_in(amount + ahead(own, rivals, bound.kind))
        if bound.is_paced or seconds > 0:
            told.update(using)
        if seconds > found.seconds:
            found = Finish(seconds=seconds, bound=bound)
    for scope_id, speed in speeds.items():
        using = [n for n, work in enumerate(mine) if scope_id in work.scope_ids]
        own = [mine[n] for n in using]
        rivals = [other for other in others if scope_id in other.scope_ids]
        amount = sum(work.items for work in own) + ahead(own, rivals, "requests")
        told.update(using)
        if own and amount / speed > found.seconds:
            found = Finish(seconds=amount / speed, bound=None)
    if len(told) < len(mine):
        return None
    rest = max((work.blocked_s for work in mine), default=0)
    return Finish(seconds=found.seconds + rest, bound=found.bound)


# What is looked at --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Why nothing of a batch, or of a resource, can be begun now, and until when.

    ``until`` is None where nobody can know. ``items_ahead``: what others have in line that is
    served before or beside it.
    """

    reason: Reason
    scope: NamedScope | None
    limit: LimitOf | None
    until: datetime | None
    items_ahead: int
    tokens_ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta:
    """When the last item is begun, and how fast that is."""

    at: datetime
    seconds_left: float
    requests_per_minute: float | None
    tokens_per_minute: float | None
    limit: LimitOf | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a batch waits for, and when it will be done."""

    waiting: Waiting | None
    eta: Eta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A batch that nobody has made yet: what it would ask for and cost, and how long that takes.

    ``is_feasible``: whether it is done by ``expires_at``, as far as one knows; None: nobody can
    tell. ``why_not`` says why it is not.
    """

    input_tokens: int
    output_tokens: int
    expected: Expected
    eta: Eta | None
    items_ahead: int
    is_feasible: bool | None
    why_not: str | None
    limit: LimitOf | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Competing:
    batch_id: UUID
    resource_id: UUID
    priority: int
    weight: float
    pending: int
    scope_ids: list[UUID]
    mean_input_tokens: float
    mean_output_tokens: float
    blocked_s: float

    @property
    def work(self) -> Work:
        return Work(
            items=self.pending,
            input_tokens=self.pending * self.mean_input_tokens,
            output_tokens=self.pending * self.mean_output_tokens,
            scope_ids=frozenset(self.scope_ids),
            priority=self.priority,
            weight=self.weight,
            blocked_s=self.blocked_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waits:
    resource_id: UUID
    is_paused: bool
    reason: WaitReason | None
    waits_for: UUID | None
    next_at: datetime | None
    is_set_aside: bool
    own_until: datetime | None
    own_waits_for: UUID | None
    waits_in: UUID | None
    now: datetime
    has_worker: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    resource_id: UUID
    scope_ids: list[UUID]
    output_mean: float | None
    blocked_s: float


_flows_competing = Query("capacity", "flows_competing", _Competing)
_batch_waits = Query("capacity", "batch_waits", _Waits)
_resource_waits = Query("capacity", "resource_waits", _Waits)
_resources_learned = Query("capacity", "resources_learned", _Learned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clockwork:
    """The settings that the claim goes by, and how long a worker may be silent."""

    guard_s: float
    burst_s: float
    dead_after_s: float


async def of_batch(conn: Connection, *, batch: Batch, clockwork: Clockwork) -> Outlook:
    """What a batch waits for now, and when it will be done."""
    if not batch.pending:
        return Outlook(waiting=None, eta=None)
    waits = await _batch_waits.all(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        dead_after_s=clockwork.dead_after_s,
    )
    if not waits:
        return Outlook(waiting=None, eta=None)
    scope_ids = await capacity.batch_scopes(
        conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
    )
    view = await _View.of(
        conn,
        workspace_id=batch.workspace_id,
        scope_ids=scope_ids,
        batch_id=batch.batch_id,
        clockwork=clockwork,
    )
    mine = [flow for flow in view.flows if flow.batch_id == batch.batch_id]
    others = [flow for flow in view.flows if flow.batch_id != batch.batch_id]
    waiting = _first(waits, view, mine, others)
    eta = None
    if all(w.has_worker for w in waits) and len(mine) == len(waits):
        eta = view.eta([flow.work for flow in mine], [flow.work for flow in others], waits[0].now)
    return Outlook(waiting=waiting, eta=eta)


async def of_resource(
    conn: Connection, *, workspace_id: UUID, resource_id: UUID, clockwork: Clockwork
) -> Waiting | None:
    """What the items of a resource wait for now; None: nothing waits, or for nothing."""
    waits = await _resource_waits.all(
        conn,
        workspace_id=workspace_id,
        resource_id=resource_id,
        dead_after_s=clockwork.dead_after_s,
    )
    if not waits:
        return None
    scope_ids = await capacity.resource_scopes(
        conn, workspace_id=workspace_id, resource_id=resource_id
    )
    if waits[0].waits_in is not None:
        scope_ids.append(waits[0].waits_in)
    view = await _View.of(
        conn, workspace_id=workspace_id, scope_ids=scope_ids, batch_id=None, clockwork=clockwork
    )
    return _first(waits, view, [], [])


async def output_means(
    conn: Connection, *, workspace_id: UUID, resource_ids: Sequence[UUID]
) -> dict[UUID, float]:
    """How long the answers of resources are, of those that gave enough of them, in tokens."""
    rows = await _resources_learned.all(
        conn, workspace_id=workspace_id, resource_ids=list(resource_ids)
    )
    return {row.resource_id: row.output_mean for row in rows if row.output_mean is not None}


async def of_new(
    conn: Connection,
    *,
    workspace_id: UUID,
    batch_id: UUID,
    api_key_id: UUID | None,
    appraisal: Appraisal,
    amounts: Sequence[Amount],
    priority: int,
    weight: float,
    expires_at: datetime | None,
    source_ip: str | None,
    metadata: Mapping[str, object],
    clockwork: Clockwork,
) -> Plan:
    """How long a batch would take that was appraised and not made, and what it would cost."""
    if not appraisal.loads:
        return Plan(
            input_tokens=0,
            output_tokens=0,
            expected=Expected(cost=None),
            eta=None,
            items_ahead=0,
            is_feasible=None,
            why_not=None,
            limit=None,
        )
    learned = {
        row.resource_id: row
        for row in await _resources_learned.all(
            conn, workspace_id=workspace_id, resource_ids=list(appraisal.loads)
        )
    }
    own_ids: set[UUID] = {batch_id} if api_key_id is None else {batch_id, api_key_id}
    own = NamedScope(scope_id=batch_id, kind="batch", name=None, dimension=None, value=None)
    everywhere = {s for row in learned.values() for s in row.scope_ids} | own_ids
    limits = await capacity.limits(conn, workspace_id=workspace_id, scope_ids=list(everywhere))
    unused: list[tuple[NamedScope, Amount]] = [
        (own, amount) for amount in capacity.tightest(amounts)
    ]
    values: dict[UUID, UUID] = {}
    for limit in limits:
        if limit.dimension is not None:
            value = capacity.value_of(limit.dimension, source_ip=source_ip, metadata=metadata)
            scope_id = capacity.value_scope_id(limit, value)
            values[scope_id] = limit.scope_id
            counted = NamedScope(
                scope_id=scope_id, kind="value", name=None, dimension=limit.dimension, value=value
            )
            unused.append((counted, limit.amount))
    view = await _View.of(
        conn,
        workspace_id=workspace_id,
        scope_ids=[*everywhere, *values],
        batch_id=None,
        clockwork=clockwork,
    )
    view.suppose(unused)
    mine: list[Work] = []
    for resource_id, load in appraisal.loads.items():
        known = learned[resource_id]
        scope_ids = frozenset(known.scope_ids) | own_ids
        counted_by = {s for s, parent in values.items() if parent in scope_ids}
        mine.append(
            Work(
                items=load.items,
                input_tokens=load.input_tokens,
                output_tokens=load.output_tokens,
                scope_ids=scope_ids | counted_by,
                priority=priority,
                weight=weight,
                blocked_s=known.blocked_s,
            )
        )
    others = [flow.work for flow in view.flows]
    using = [o for o in others if any(o.scope_ids & w.scope_ids for w in mine)]
    done = finish(mine, others, view.bounds, view.speeds)
    eta = _eta(done, mine, view.now)
    is_feasible, why_not = _feasible(done, eta, expires_at)
    return Plan(
        input_tokens=round(sum(w.input_tokens for w in mine)),
        output_tokens=round(sum(w.output_tokens for w in mine)),
        expected=await prices.expected(
            conn,
            workspace_id=workspace_id,
            tokens={
                each: (load.input_tokens, load.output_tokens)
                for each, load in appraisal.loads.items()
            },
        ),
        eta=eta,
        items_ahead=round(ahead(mine, using, "requests")),
        is_feasible=is_feasible,
        why_not=why_not,
        limit=done.bound.of if done is not None and done.bound is not None else None,
    )


def _feasible(
    done: Finish | None, eta: Eta | None, expires_at: datetime | None
) -> tuple[bool | None, str | None]:
    if done is not None and done.seconds > _MOST_S:
        return False, "a limit for a lifetime has less left than the batch needs"
    if eta is None:
        return None, None
    if expires_at is not None and eta.at > expires_at:
        late = round((eta.at - expires_at).total_seconds())
        return False, f"its last item would be begun {late:,} s after the deadline"
    return True, None


class _View:
    """Limits, speeds and flows around some scopes, as they are now."""

    def __init__(
        self,
        usage: Sequence[Usage],
        scopes: Mapping[UUID, NamedScope],
        flows: Sequence[_Competing],
        now: datetime,
        *,
        paces: bool,
    ) -> None:
        self.flows = flows
        self.scopes = scopes
        self.now = now
        self._paces = paces
        self._usage = {u.limit_id: u for u in usage}
        self.bounds = [bound for u in usage for bound in _bounds(u, scopes, paces=paces)]
        self.speeds: dict[UUID, float] = {}
        for u in usage:
            if u.recent_requests and u.recent_s is not None and u.recent_s >= _MEASURED_S:
                self.speeds[u.scope_id] = u.recent_requests / u.recent_s

    @classmethod
    async def of(
        cls,
        conn: Connection,
        *,
        workspace_id: UUID,
        scope_ids: Sequence[UUID],
        batch_id: UUID | None,
        clockwork: Clockwork,
    ) -> "_View":
        usage = await capacity.usage(
            conn,
            workspace_id=workspace_id,
            scope_ids=scope_ids,
            guard_s=clockwork.guard_s,
            with_reserved=False,
        )
        scopes = await capacity.named(
            conn, workspace_id=workspace_id, scope_ids=scope_ids, batch_id=batch_id
        )
        flows = await _flows_competing.all(
            conn, workspace_id=workspace_id, scope_ids=list(scope_ids)
        )
        # Every model has an account, so there is a row, and the clock of the database with it.
        return cls(usage, scopes, flows, usage[0].now, paces=clockwork.burst_s < _MINUTE_S)

    def suppose(self, unused: Sequence[tuple[NamedScope, Amount]]) -> None:
        """Let limits bind that do not exist yet, or of which nothing was used yet."""
        known = {bound.scope_id for bound in self.bounds}
        for scope, amount in unused:
            if scope.scope_id in known and scope.kind == "value":
                continue
            for kind, most in amount.by_kind.items():
                self.bounds.append(
                    Bound(
                        scope_id=scope.scope_id,
                        period=amount.period,
                        kind=kind,
                        most=most,
                        used=0,
                        is_sliding=amount.slides,
                        is_paced=self._paces and amount.period == "minute",
                        resets_in_s=_period_left(amount.period, self.now),
                        of=LimitOf(
                            scope=scope,
                            period=amount.period,
                            is_sliding=amount.slides,
                            source="given",
                            kind=kind,
                            most=most,
                        ),
                    )
                )

    def limit(self, limit_id: UUID | None) -> LimitOf | None:
        """A limit that somebody waits for, by the kind of which least is left."""
        found = self._usage.get(limit_id) if limit_id is not None else None
        kind = found.tightest if found is not None else None
        if found is None or kind is None:
            return None
        return _limit_of(found, kind, found.bounds[kind], self.scopes)

    def eta(self, mine: Sequence[Work], others: Sequence[Work], now: datetime) -> Eta | None:
        return _eta(finish(mine, others, self.bounds, self.speeds), mine, now)


def _eta(done: Finish | None, mine: Sequence[Work], now: datetime) -> Eta | None:
    if done is None or done.seconds > _MOST_S:
        return None
    minutes = done.seconds / _MINUTE_S
    return Eta(
        at=now + timedelta(seconds=done.seconds),
        seconds_left=done.seconds,
        requests_per_minute=sum(w.items for w in mine) / minutes if minutes else None,
        tokens_per_minute=sum(w.amount("tokens") for w in mine) / minutes if minutes else None,
        limit=None if done.bound is None else done.bound.of,
    )


def _bounds(usage: Usage, scopes: Mapping[UUID, NamedScope], *, paces: bool) -> list[Bound]:
    bounds = usage.bounds
    if paces and usage.paced_requests is not None:
        bounds["requests"] = usage.paced_requests
    left = usage.resets_at - usage.now if usage.resets_at is not None else timedelta()
    used = usage.used
    return [
        Bound(
            scope_id=usage.scope_id,
            period=usage.period,
            kind=kind,
            most=max(most, 1),
            used=used[kind],
            is_sliding=usage.sliding,
            is_paced=paces and usage.period == "minute",
            resets_in_s=left.total_seconds(),
            of=_limit_of(usage, kind, most, scopes),
        )
        for kind, most in bounds.items()
    ]


def _limit_of(
    usage: Usage, kind: Kind, most: int, scopes: Mapping[UUID, NamedScope]
) -> LimitOf | None:
    scope = scopes.get(usage.scope_id)
    if scope is None:
        return None
    return LimitOf(
        scope=scope,
        period=usage.period,
        is_sliding=usage.sliding,
        source=usage.source,
        kind=kind,
        most=most,
    )


def _period_left(period: Period, now: datetime) -> float:
    """Seconds until the UTC calendar's present period ends."""
    begun = now.astimezone(UTC).replace(second=0, microsecond=0)
    match period:
        case "minute":
            until = begun + timedelta(minutes=1)
        case "hour":
            until = begun.replace(minute=0) + timedelta(hours=1)
        case "day":
            until = begun.replace(hour=0, minute=0) + timedelta(days=1)
        case "week":
            until = begun.replace(hour=0, minute=0) + timedelta(days=7 - begun.weekday())
        case "month":
            first = begun.replace(day=1, hour=0, minute=0)
            until = (first + timedelta(days=31)).replace(day=1)
        case "lifetime":
            return 0
    return (until - now).total_seconds()


def _first(
    waits: Sequence[_Waits],
    view: _View,
    mine: Sequence[_Competing],
    others: Sequence[_Competing],
) -> Waiting | None:
    """What all of these wait for: of several the wait that ends first. None: one of them can go."""
    found: list[Waiting] = []
    for each in waits:
        own = [flow.work for flow in mine if flow.resource_id == each.resource_id]
        beside = [flow.work for flow in others if flow.resource_id == each.resource_id]
        waiting = _one(
            each,
            view,
            items_ahead=round(ahead(own, beside, "requests")),
            tokens_ahead=round(ahead(own, beside, "tokens")),
        )
        if waiting is None:
            return None
        found.append(waiting)
    known = [w for w in found if w.until is not None]
    running = [w for w in found if w.reason != "paused"]
    return min(known, key=lambda w: w.until or view.now) if known else (running or found)[0]


def _one(each: _Waits, view: _View, *, items_ahead: int, tokens_ahead: int) -> Waiting | None:
    reason: Reason
    scope: NamedScope | None = None
    limit: LimitOf | None = None
    until: datetime | None = None
    if each.is_paused:
        reason = "paused"
    elif each.is_set_aside:
        reason, until = "capacity", each.own_until
        limit = view.limit(each.own_waits_for)
    elif each.reason is not None and (each.next_at is None or each.next_at > each.now):
        reason = each.reason
        until = None if reason == "concurrency" else each.next_at
        limit = view.limit(each.waits_for)
        scope = view.scopes.get(each.waits_for) if each.waits_for is not None else None
        if reason == "capacity" and limit is None:
            # Another batch's own limit is the next thing to happen here: this one is not held up by
            # that, and not due either, so all that it has in line was tried before.
            reason, until = "retry", None
    elif not each.has_worker:
        reason = "worker"
    else:
        return None
    return Waiting(
        reason=reason,
        scope=scope if limit is None else limit.scope,
        limit=limit,
        until=until,
        items_ahead=items_ahead,
        tokens_ahead=tokens_ahead,
    )
