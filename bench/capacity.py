"""Capacity: does Sluice use all of a limit and never more, share it as promised, and find unknown ones?

Method. Per scenario a fresh Postgres (embedded, fsync on), a simulator that enforces a limit, and three
worker processes (``sluice worker``) that begin before the first item is there, all on this machine. The
simulator is the judge of calls and tokens, by its report: what it accepted in each second, and samples of
its counters a second apart. Where it cannot tell batches apart, the times of sending in ``attempts`` do.
"Second 60" is counted from the first accepted call. Answers take 400 ms in the median. A run ends in the
middle of its batches: workers are stopped in good order, and then counters and ledger must equal their
recounts (``sluice doctor``) and no worker may have logged an error; that is part of every target.

    python -m bench capacity                                   # all, an hour
    python -m bench capacity --quick --only requests-sliding weights
    python -m bench capacity --only burst --json burst.json    # with every second and every sample

Requests are questions of varied length, each different: generated, or a column ``text`` of ``--file``.
``--quick`` shrinks every span of a scenario alike, to some 90 s together: a look, not a verdict, because
limits are per minute. Each scenario prints a row; the exit status is 1 if a target was missed.
"""

import argparse
import asyncio
import csv
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from app.capacity import Amount
from app.inputs import json_body
from app.intake import NewBatch
from bench._rig import Rig

QUICK_S = 90.0
PATIENCE_S = 60.0
"""How long something that must happen at once may take before the scenario is given up."""

# What the engine's interfaces may change ----------------------------------------------------------


def per(period: Any, *, requests: int | None = None, tokens: int | None = None) -> list[Amount]:  # noqa: ANN401 - a literal of app.capacity
    """A limit of so many requests or tokens per period."""
    return [Amount(period=period, requests=requests, tokens=tokens)]


def limited(amounts: Sequence[Amount]) -> dict[str, Any]:
    """Fields of a new batch with limits of its own."""
    return {"amounts": amounts}


def weighted(weight: float) -> dict[str, Any]:
    """Fields of a new batch with a weight."""
    return {"weight": weight}


def by_key(api_key_id: UUID) -> dict[str, Any]:
    """Fields of a new batch that a key created."""
    return {"created_by_api_key_id": api_key_id}


async def served(rig: Rig) -> dict[str, dict[str, int]]:
    """Of each batch: items answered, items with a call out, and tokens of its answers."""
    async with rig.db.connection() as conn:
        rows = await (
            await conn.execute(
                "select batch_id, sum(completed), sum(running), sum(input_tokens + output_tokens)"
                " from flows where workspace_id = %s group by batch_id",
                (rig.ids["workspace_id"],),
            )
        ).fetchall()
    return {
        str(batch_id): {"answered": int(answered), "running": int(running), "tokens": int(tokens)}
        for batch_id, answered, running, tokens in rows
    }


async def sent(rig: Rig) -> "list[Sent]":
    """Every call that was made and has ended, in the order of sending."""
    async with rig.db.connection() as conn:
        rows = await (
            await conn.execute(
                "select extract(epoch from started_at)::float8, batch_id, resource_id from attempts"
                " where workspace_id = %s and started_at is not null and charged_requests > 0"
                " order by started_at",
                (rig.ids["workspace_id"],),
            )
        ).fetchall()
    return [Sent(at=at, batch_id=batch, resource_id=resource) for at, batch, resource in rows]


# Measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A call by the worker's clock."""

    at: float
    batch_id: UUID
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One target and what was measured."""

    target: str
    measured: str
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one scenario came to."""

    name: str
    what: str
    target: str
    measured: str
    ok: bool
    took_s: float
    notes: list[str]
    raw: dict[str, Any]


@dataclass
class Run:
    """One run of a scenario; ``raw`` is what it leaves for the JSON, ``notes`` for the reader."""

    options: argparse.Namespace
    home: Path
    scale: float
    raw: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])

    def span(self, seconds: float) -> int:
        """A span of the full run as long as it is in this one."""
        return max(round(seconds * self.scale), 1)

    def rig(
        self, *, concurrency: int | None = None, **behaviour: object
    ) -> AbstractAsyncContextManager[Rig]:
        """Servers of its own, with a simulator that behaves so."""
        return Rig.open(
            self.home,
            simulate={"latency_ms": 400.0, "output_sigma": 0.6} | behaviour,
            variables={"SLUICE_CONCURRENCY": str(concurrency or self.options.concurrency)},
            worker_log=self.home / "workers.log",
        )

    def bodies(self, number: float, *, max_tokens: int | None = None) -> list[bytes]:
        """So many requests, each different."""
        bound = {} if max_tokens is None else {"max_tokens": max_tokens}
        return [
            json_body({"messages": [{"role": "user", "content": text}]} | bound)
            for text in itertools.islice(self._texts(), round(number))
        ]

    def _texts(self) -> "itertools.chain[str]":
        file: Path | None = self.options.file
        if file is None:
            draw = random.Random(1)  # noqa: S311 - the same texts in every run
            return itertools.chain(
                f"Question {n}: {_TEXT[draw.randrange(100) :][: draw.randrange(30, 400)]}"
                for n in itertools.count()
            )
        with file.open(newline="", encoding="utf-8") as lines:
            texts = [row["text"] for row in csv.DictReader(lines)]
        return itertools.chain(f"{texts[n % len(texts)]} ({n})" for n in itertools.count())

    async def start(self, rig: Rig) -> None:
        """Start the workers."""
        await rig.start_workers(self.options.workers)

    async def finish(self, rig: Rig) -> Check:
        """Stop the workers in good order and recount."""
        await rig.stop_workers()
        wrong = await rig.findings() + rig.errors()
        self.raw["wrong"] = wrong
        self.notes += wrong[:5]
        return Check(
            target="recount equal",
            measured=f"{len(wrong)} findings" if wrong else "equal",
            ok=not wrong,
        )


_TEXT = (
    "My card has not arrived yet, and the app shows a pending transfer to another account which I did "
    "not make. Can you tell me where the money went, how long it takes to come back, and what the fee is? "
) * 4


class Watch:
    """The simulator's counters and the batches' progress, sampled a second apart."""

    def __init__(self, run: Run, rig: Rig) -> None:
        self.rig = rig
        self.samples: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {}
        run.raw["samples"] = self.samples
        self._raw = run.raw

    @property
    def first(self) -> int:
        """The second of the simulator's clock in which it accepted the first call."""
        series: list[int] = self.report["accepted_per_second"]
        return next(n for n, calls in enumerate(series) if calls)

    async def look(self) -> float:
        """Take a sample; its time by the simulator's clock."""
        self.report = self._raw["report"] = await self.rig.report()
        counters = {k: v for k, v in self.report.items() if isinstance(v, int | float)}
        self.samples.append(counters | {"batches": await served(self.rig)})
        return float(self.report["seconds"])

    async def until(self, second: float) -> float:
        """Sample until so many seconds after the first accepted call; the simulator's clock."""
        begun = time.monotonic()
        while True:
            now = await self.look()
            left = self.first + second - now if self.report["accepted"] else PATIENCE_S
            if left <= 0:
                return now
            if time.monotonic() - begun > second + PATIENCE_S:
                raise RuntimeError(f"{self.report['accepted']} calls came, and then none")
            await asyncio.sleep(min(1.0, left))

    def accepted(self, begin: float, end: float, *, kind: str = "accepted_per_second") -> int:
        """Calls, or tokens, accepted from one second after the first call to another."""
        series: list[int] = self.report[kind]
        return sum(series[self.first + round(begin) : self.first + round(end)])

    def rise(self, begin: float, end: float, *path: str) -> float:
        """By how much a counter rose between two times of the simulator's clock."""
        return self._at(end, path) - self._at(begin, path)

    def _at(self, second: float, path: Sequence[str]) -> float:
        before, after = 0.0, 0.0
        for sample in self.samples:
            value: Any = sample
            for name in path:
                value = value.get(name, {}) if name != path[-1] else value.get(name, 0)
            if sample["seconds"] >= second:
                passed = sample["seconds"] - before
                share = 1.0 if passed <= 0 else (second - before) / passed
                return after + (value - after) * share
            before, after = sample["seconds"], value
        return after


def none_refused(report: dict[str, Any]) -> Check:
    """Nothing was refused, at any time."""
    refused: int = report["refused"]
    return Check(target="0 refused", measured=f"{refused} refused", ok=refused == 0)


def used(share: float, least: float) -> Check:
    """So much of a limit was used."""
    return Check(target=f">= {least:.0%} used", measured=f"{share:.1%} used", ok=share >= least)


def few_refused(refused: float, received: float) -> Check:
    """Less than 2 % of the calls were refused."""
    if received <= 0:
        return Check(target="< 2 % refused", measured="no call", ok=False)
    share = refused / received
    return Check(target="< 2 % refused", measured=f"{share:.1%} refused", ok=share < 0.02)


def peak(times: Sequence[float], span_s: float) -> int:
    """The most within any span, of times in order."""
    most = begin = 0
    for n, at in enumerate(times):
        while times[begin] <= at - span_s:
            begin += 1
        most = max(most, n - begin + 1)
    return most


# Scenarios ----------------------------------------------------------------------------------------


async def requests(run: Run, *, algorithm: str) -> list[Check]:
    """A known request limit, the same as the provider's."""
    rpm, begin, end = 1200, run.span(60), run.span(180)
    holds_s: float = run.options.bucket_seconds
    async with run.rig(rpm=rpm, algorithm=algorithm, bucket_seconds=holds_s) as rig:
        resource_id = await rig.create_resource("r", per("minute", requests=rpm))
        await run.start(rig)
        await rig.submit(resource_id, run.bodies(rpm * (end / 60 + 2)))
        watch = Watch(run, rig)
        await watch.until(end)
        return [
            none_refused(watch.report),
            used(watch.accepted(begin, end) / (rpm * (end - begin) / 60), 0.97),
            await run.finish(rig),
        ]


async def tokens(run: Run, *, algorithm: str, tpm: int) -> list[Check]:
    """A known token limit; requests ask for four times what the median one uses."""
    median, begin, end = 200, run.span(60), run.span(180)
    async with run.rig(
        tpm=tpm,
        algorithm=algorithm,
        bucket_seconds=run.options.bucket_seconds,
        output_tokens=float(median),
        charge="actual",
    ) as rig:
        resource_id = await rig.create_resource("r", per("minute", tokens=tpm))
        await run.start(rig)
        await rig.submit(
            resource_id, run.bodies(tpm / median * (end / 60 + 2), max_tokens=4 * median)
        )
        watch = Watch(run, rig)
        await watch.until(end)
        accepted = watch.accepted(begin, end, kind="accepted_tokens_per_second")
        return [
            none_refused(watch.report),
            used(accepted / (tpm * (end - begin) / 60), 0.95),
            await run.finish(rig),
        ]


async def shared_connection(run: Run) -> list[Check]:
    """Two resources, and a limit on their connection only."""
    rpm, begin, end = 1200, run.span(60), run.span(180)
    async with run.rig(rpm=rpm) as rig:
        connection_id = await rig.create_connection("c", per("minute", requests=rpm))
        resource_ids = [
            await rig.create_resource(name, connection_id=connection_id) for name in ("r1", "r2")
        ]
        await run.start(rig)
        bodies = run.bodies(2 * rpm * (end / 60 + 2))
        for resource_id, half in zip(resource_ids, (bodies[::2], bodies[1::2]), strict=True):
            await rig.submit(resource_id, half)
        watch = Watch(run, rig)
        await watch.until(end)
        recount = await run.finish(rig)
        calls = within(await sent(rig), begin, end)
        shares = [
            sum(call.resource_id == resource_id for call in calls) / max(len(calls), 1)
            for resource_id in resource_ids
        ]
        run.raw["shares"] = shares
        return [
            none_refused(watch.report),
            used(watch.accepted(begin, end) / (rpm * (end - begin) / 60), 0.97),
            Check(
                target="each >= 40 %",
                measured=" and ".join(f"{share:.0%}" for share in shares),
                ok=min(shares) >= 0.4,
            ),
            recount,
        ]


def within(calls: Sequence[Sent], begin: float, end: float) -> list[Sent]:
    """Calls sent from one second after the first to another."""
    first = calls[0].at if calls else 0.0
    return [call for call in calls if begin <= call.at - first < end]


async def batch_limit(run: Run) -> list[Check]:
    """A batch with 50 per minute of its own beside a large one."""
    rpm, own, begin, end = 600, 50, run.span(60), run.span(180)
    async with run.rig(rpm=rpm) as rig:
        resource_id = await rig.create_resource("r", per("minute", requests=rpm))
        await run.start(rig)
        large = await rig.submit(resource_id, run.bodies(rpm * (end / 60 + 2)))
        small = await rig.submit(
            resource_id, run.bodies(own * (end / 60 + 3)), limited(per("minute", requests=own))
        )
        watch = Watch(run, rig)
        await watch.until(end)
        recount = await run.finish(rig)
        calls = await sent(rig)
        got = {
            name: sum(call.batch_id == batch.batch_id for call in within(calls, begin, end))
            * (60 / (end - begin))
            for name, batch in {"limited": small, "other": large}.items()
        }
        most = peak([call.at for call in calls if call.batch_id == small.batch_id], 60)
        run.raw |= {"per_minute": got, "limited_peak_60s": most}
        return [
            none_refused(watch.report),
            Check(
                target=f"{own - 2} to {own}/min, <= {own} in any 60 s",
                measured=f"{got['limited']:.1f}/min beside {got['other']:.1f}, peak {most}",
                ok=own - 2 <= got["limited"] <= own and most <= own,
            ),
            used(watch.accepted(begin, end) / (rpm * (end - begin) / 60), 0.97),
            recount,
        ]


async def exhausted(run: Run) -> list[Check]:
    """An exhausted batch and 80 batches of an exhausted key beside a normal batch.

    80, because a claim that ranks flows before it looks at their limits ranks a bounded number.
    """
    rpm, own, items = 1200, 10, max(round(600 * run.scale), 60)
    async with run.rig() as rig:
        alone_id, beside_id = [
            await rig.create_resource(name, per("minute", requests=rpm)) for name in ("r1", "r2")
        ]
        key_id = await rig.create_key("k", per("hour", requests=own))
        await run.start(rig)
        bodies = run.bodies(items)
        alone_s = await took(rig, await rig.submit(alone_id, bodies))
        spent = await rig.submit(beside_id, run.bodies(500), limited(per("day", requests=own)))
        of_key = [await rig.submit(beside_id, run.bodies(10), by_key(key_id)) for _ in range(80)]

        async def answered() -> tuple[int, int]:
            so_far = await served(rig)
            return (
                so_far[str(spent.batch_id)]["answered"],
                sum(so_far[str(batch.batch_id)]["answered"] for batch in of_key),
            )

        async def is_spent() -> bool:
            return min(await answered()) >= own

        await soon(is_spent)
        await asyncio.sleep(2)
        beside_s = await took(rig, await rig.submit(beside_id, bodies))
        by_batch, by_its_key = await answered()
        run.raw |= {"alone_s": alone_s, "beside_s": beside_s}
        run.raw |= {"answered_of_batch": by_batch, "answered_of_key": by_its_key}
        return [
            Check(
                target="as fast as alone (<= 1.1)",
                measured=f"{beside_s / alone_s:.2f} ({alone_s:.1f} s, {beside_s:.1f} s)",
                ok=beside_s <= 1.1 * alone_s,
            ),
            Check(
                target=f"{own} of the batch, {own} of the key",
                measured=f"{by_batch}, {by_its_key}",
                ok=by_batch == by_its_key == own,
            ),
            await run.finish(rig),
        ]


async def soon(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it is so, or for `PATIENCE_S`; what follows is then measured as it is."""
    for _ in range(round(PATIENCE_S / 0.25)):
        if await is_so():
            return
        await asyncio.sleep(0.25)


async def is_idle(rig: Rig, batch: NewBatch) -> bool:
    """Whether no call of a batch is out."""
    return (await rig.batch(batch)).running == 0


async def took(rig: Rig, batch: NewBatch, *, most_s: float = 300.0) -> float:
    """Wait for a batch's end; seconds from its creation to it, by the database's clock."""
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline:
        found = await rig.batch(batch)
        if found.completed_at is not None:
            return (found.completed_at - found.created_at).total_seconds()
        await asyncio.sleep(0.05)
    raise RuntimeError(f"a batch did not end within {most_s:.0f} s")


async def small_beside_large(run: Run) -> list[Check]:
    """Ten items while 20,000 run: once workers are the bottleneck, once a rate limit is."""
    probes, checks = max(round(9 * run.scale), 3), list[Check]()
    async with run.rig(concurrency=30) as rig:
        await run.start(rig)
        bodies = run.bodies(20_000)
        for bottleneck, rpm in (("workers", 600_000), ("rate", 1200)):
            # The first is no bottleneck, but known: discovering limits is another scenario.
            resource_id = await rig.create_resource(bottleneck, per("minute", requests=rpm))
            times: dict[str, list[float]] = {}
            large: NewBatch | None = None
            for when in ("alone", "beside"):
                if when == "beside":
                    large = await rig.submit(resource_id, bodies)
                    await asyncio.sleep(5)
                times[when] = []
                for n in range(probes):
                    small = await rig.submit(resource_id, run.bodies(10))
                    times[when].append(await took(rig, small))
                    await asyncio.sleep(1 + n % 3 / 3)
            assert large is not None
            progress = (await served(rig))[str(large.batch_id)]
            await rig.pause(large)
            await soon(partial(is_idle, rig, large))
            alone_s, beside_s = (statistics.median(times[when]) for when in ("alone", "beside"))
            run.raw[bottleneck] = times | {"large": progress}
            was_busy = progress["running"] > 0
            checks.append(
                Check(
                    target=f"{bottleneck}: <= 2 x alone",
                    measured=f"{beside_s / alone_s:.2f} x ({alone_s:.2f} s, {beside_s:.2f} s)"
                    + ("" if was_busy else ", but the large one had ended"),
                    ok=beside_s <= 2 * alone_s and was_busy,
                )
            )
        return [*checks, await run.finish(rig)]


async def weights(run: Run) -> list[Check]:
    """Two large batches of weights 1 and 3: tokens of answers while both are busy."""
    rpm, begin, end = 1200, run.span(30), run.span(180)
    async with run.rig(rpm=rpm) as rig:
        resource_id = await rig.create_resource("r", per("minute", requests=rpm))
        await run.start(rig)
        bodies = run.bodies(2 * rpm * (end / 60 + 2))
        light, heavy = [
            await rig.submit(resource_id, half, weighted(weight))
            for half, weight in ((bodies[::2], 1.0), (bodies[1::2], 3.0))
        ]
        watch = Watch(run, rig)
        await watch.until(end)
        got = [
            watch.rise(
                watch.first + begin, watch.first + end, "batches", str(batch.batch_id), "tokens"
            )
            for batch in (light, heavy)
        ]
        ratio = got[1] / got[0] if got[0] else float("inf")
        run.raw["tokens"] = got
        return [
            none_refused(watch.report),
            Check(
                target="1 : 3 within 5 %",
                measured=f"1 : {ratio:.2f}",
                ok=abs(ratio / 3 - 1) <= 0.05,
            ),
            await run.finish(rig),
        ]


async def unknown(run: Run, *, send_headers: bool) -> list[Check]:
    """No limit configured; the provider has one, and says so or refuses in silence."""
    rpm, begin, end = 600, run.span(60), run.span(240)
    async with run.rig(rpm=rpm, send_headers=send_headers) as rig:
        resource_id = await rig.create_resource("r")
        await run.start(rig)
        await rig.submit(resource_id, run.bodies(rpm * (end / 60 + 2)))
        watch = Watch(run, rig)
        await watch.until(end)
        span = (watch.first + begin, watch.first + end)
        before = watch.rise(0, span[0], "refused")
        run.raw["refused_before"] = before
        run.notes.append(f"refused before second {begin}: {before:.0f}")
        return [
            few_refused(watch.rise(*span, "refused"), watch.rise(*span, "received")),
            used(watch.rise(*span, "accepted") / (rpm * (end - begin) / 60), 0.9),
            await run.finish(rig),
        ]


async def changing(run: Run, *, send_headers: bool) -> list[Check]:
    """The provider's limit changes every two minutes; the second minute after each is judged."""
    phase, rates = run.span(120), (600, 300, 600, 1200)
    async with run.rig(rpm=rates[0], send_headers=send_headers) as rig:
        resource_id = await rig.create_resource("r")
        await run.start(rig)
        await rig.submit(resource_id, run.bodies(2 * sum(rates) * phase / 60))
        watch, checks = Watch(run, rig), list[Check]()
        await watch.until(phase)
        for n, rpm in enumerate(rates[1:], start=2):
            await rig.behave(rpm=rpm)
            changed = await watch.look()
            await watch.until(changed - watch.first + phase)
            span = (changed + phase / 2, changed + phase)
            share = watch.rise(*span, "accepted") / (rpm * phase / 2 / 60)
            refused = few_refused(watch.rise(*span, "refused"), watch.rise(*span, "received"))
            run.raw[f"phase_{n}"] = {
                "rpm": rpm,
                "changed_at": changed,
                "used": share,
                "refused": refused.measured,
            }
            checks.append(
                Check(
                    target=f"{rpm}: >= 90 %, < 2 % refused",
                    measured=f"{share:.1%}, {refused.measured}",
                    ok=share >= 0.9 and refused.ok,
                )
            )
        return [*checks, await run.finish(rig)]


async def burst(run: Run) -> list[Check]:
    """The most calls in any second under 6,000 per minute, from the first one on."""
    rpm, end = 6000, run.span(90)
    async with run.rig(rpm=rpm) as rig:
        resource_id = await rig.create_resource("r", per("minute", requests=rpm))
        await run.start(rig)
        await rig.submit(resource_id, run.bodies(rpm * (end / 60 + 1)))
        watch = Watch(run, rig)
        await watch.until(end)
        recount = await run.finish(rig)
        series: list[int] = watch.report["accepted_per_second"][watch.first : watch.first + end]
        most_sent = peak([call.at for call in await sent(rig)], 1)
        histogram = Counter(calls // 10 * 10 for calls in series)
        run.raw |= {"histogram": dict(sorted(histogram.items())), "peak_sent_in_1s": most_sent}
        told = ", ".join(f"{low}-{low + 9}: {histogram[low]}" for low in sorted(histogram))
        run.notes.append(f"seconds by accepted calls: {told}")
        most, bound = max(series), 2 * rpm // 60
        return [
            none_refused(watch.report),
            Check(
                target=f"< {bound} in any second",
                measured=f"{most} accepted, {most_sent} sent, median {statistics.median(series):.0f}",
                ok=max(most, most_sent) < bound,
            ),
            recount,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is run under a name; ``full_s`` is about how long it measures."""

    what: str
    full_s: float
    judge: Callable[[Run], Awaitable[list[Check]]]


SCENARIOS = {
    **{
        f"requests-{algorithm}": Scenario(
            what=f"known 1,200 requests/min, {algorithm}",
            full_s=180,
            judge=partial(requests, algorithm=algorithm),
        )
        for algorithm in ("sliding", "fixed", "bucket")
    },
    **{
        f"tokens-{name}": Scenario(
            what=f"known {tpm:,} tokens/min, {algorithm}, max_tokens 4 x",
            full_s=180,
            judge=partial(tokens, algorithm=algorithm, tpm=tpm),
        )
        for name, algorithm, tpm in (
            ("sliding", "sliding", 120_000),
            ("fixed", "fixed", 120_000),
            ("bucket", "bucket", 600_000),
            # Seven calls fill this bucket, and nobody knows what those in flight use.
            ("small-bucket", "bucket", 120_000),
        )
    },
    "shared-connection": Scenario(
        what="two resources, 1,200/min on their connection", full_s=180, judge=shared_connection
    ),
    "batch-limit": Scenario(
        what="a batch of 50/min beside a large one, 600/min", full_s=180, judge=batch_limit
    ),
    "exhausted": Scenario(
        what="an exhausted batch and key beside a normal batch", full_s=90, judge=exhausted
    ),
    "small-beside-large": Scenario(
        what="10 items while 20,000 run", full_s=150, judge=small_beside_large
    ),
    "weights": Scenario(what="two batches of weights 1 and 3", full_s=180, judge=weights),
    "unknown-headers": Scenario(
        what="unknown 600/min, told in headers",
        full_s=240,
        judge=partial(unknown, send_headers=True),
    ),
    "unknown-silent": Scenario(
        what="unknown 600/min, never told", full_s=240, judge=partial(unknown, send_headers=False)
    ),
    "changing-headers": Scenario(
        what="600, 300, 600, 1,200/min, told in headers",
        full_s=480,
        judge=partial(changing, send_headers=True),
    ),
    "changing-silent": Scenario(
        what="600, 300, 600, 1,200/min, never told",
        full_s=480,
        judge=partial(changing, send_headers=False),
    ),
    "burst": Scenario(what="known 6,000/min, each second", full_s=90, judge=burst),
}


# Running ------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """What the command line may say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="about 90 s for each scenario")
    parser.add_argument("--seconds", type=float, help="about so many for each, instead")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=100, help="calls in flight per worker")
    parser.add_argument(
        "--bucket-seconds", type=float, default=1.0, help="of its rate that a bucket holds"
    )
    parser.add_argument("--file", type=Path, help="CSV with a column text")
    parser.add_argument("--json", type=Path, help="all figures, per second too")
    return parser


async def judged(name: str, options: argparse.Namespace) -> Verdict:
    """Run a scenario; one that breaks has missed its target, and the others still run."""
    scenario = SCENARIOS[name]
    wanted_s: float = options.seconds or (QUICK_S if options.quick else scenario.full_s)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sluice-capacity-") as home:
        run = Run(options=options, home=Path(home), scale=min(wanted_s / scenario.full_s, 1.0))
        try:
            async with asyncio.timeout(3 * scenario.full_s + 5 * PATIENCE_S):
                checks = await scenario.judge(run)
        except Exception as error:  # noqa: BLE001 - a scenario that breaks is a row of the table
            told = f"{type(error).__name__}: {error}"
            checks = [Check(target="to end", measured=told, ok=False)]
    return Verdict(
        name=name,
        what=scenario.what,
        target="; ".join(check.target for check in checks),
        measured="; ".join(check.measured for check in checks),
        ok=all(check.ok for check in checks),
        took_s=round(time.monotonic() - begun, 1),
        notes=run.notes,
        raw=run.raw | {"scale": run.scale, "checks": [asdict(check) for check in checks]},
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """One row per scenario."""
    rows = [("scenario", "what", "target", "measured", "")]
    rows += [(v.name, v.what, v.target, v.measured, "ok" if v.ok else "MISSED") for v in verdicts]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * 5 + "|", *lines[1:]])


async def run_all(options: argparse.Namespace) -> list[Verdict]:
    """Run what was asked for, one after the other; a row as soon as it is known."""
    if options.quick or options.seconds:
        print("Shortened: a look, not a verdict; limits are per minute.", flush=True)
    verdicts: list[Verdict] = []
    for name in options.only or SCENARIOS:
        verdict = await judged(name, options)
        verdicts.append(verdict)
        print(table([verdict]).splitlines()[-1], flush=True)
        for note in verdict.notes:
            print(f"    {note}", flush=True)
        if options.json:
            options.json.write_text(
                json.dumps({"scenarios": [asdict(v) for v in verdicts]}, indent=1, default=str)
            )
    return verdicts


def main() -> None:
    """Run scenarios; exit 1 if a target was missed."""
    options = arguments().parse_args()
    # So that a SIGTERM, too, ends what was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        verdicts = asyncio.run(run_all(options))
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"\n{table(verdicts)}")
    sys.exit(0 if all(verdict.ok for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
