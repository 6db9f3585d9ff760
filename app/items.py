"""Items of a batch and what came back for them: one, a page, all in order, and every call made.

A page is read in two steps: first the numbers of its items, from a narrow index, then their texts.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

from app.batches import Batch, Status
from app.db import Connection, Query

EndedReason = Literal[
    "answered", "rejected", "exhausted", "crashed", "expired", "impossible", "cancelled"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An item with its request and, once it ended, what came back. Texts are JSON to the letter."""

    workspace_id: UUID
    batch_id: UUID
    seq: int
    resource_id: UUID
    status: Status
    ended_reason: EndedReason | None
    attempt: int
    failures: int
    max_attempts: int
    estimated_input_tokens: int
    visible_at: datetime
    claimed_at: datetime | None
    ended_at: datetime | None
    created_at: datetime
    custom_id: str | None
    vmx: dict[str, Any] | None
    request: str
    response: str | None
    headers: dict[str, str] | None
    status_code: int | None
    input_tokens: int | None
    output_tokens: int | None
    model: str | None
    connection_id: UUID | None
    provider: str | None
    request_id: str | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """An item without its texts: what followers are told who want no more."""

    seq: int
    resource_id: UUID
    failures: int
    custom_id: str | None
    input_tokens: int | None
    output_tokens: int | None
    error_code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of an item, without its request."""

    seq: int
    status: Status
    status_code: int | None
    response: str | None
    error_code: str | None
    error_message: str | None
    custom_id: str | None
    request_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One call of an item; ``outcome`` is running while it is out. Tokens as they were charged."""

    attempt: int
    outcome: str
    resource_id: UUID
    resource: str | None
    connection_id: UUID | None
    provider: str | None
    model: str | None
    worker_id: UUID | None
    claimed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    latency_ms: int | None
    status_code: int | None
    request_id: str | None
    error_code: str | None
    error_message: str | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    reasoning_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """Which items a page is to have. Empty: any. ``codes``: only failed ones with these errors."""

    statuses: Sequence[Status] = ()
    codes: Sequence[str] = ()

    def has(self, item: Item) -> bool:
        """Whether an item is wanted."""
        return (not self.statuses or item.status in self.statuses) and (
            not self.codes or item.error_code in self.codes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seq:
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    custom_id: str
    seq: int


_seqs = Query("items", "items_seqs", _Seq)
_seqs_back = Query("items", "items_seqs_back", _Seq)
_some = Query("items", "items_some", Item)
_brief = Query("items", "items_brief", Brief)
_named = Query("items", "items_named", _Named)
_first_open = Query("items", "item_first_open", _Seq)
_attempts = Query("items", "item_attempts", Attempt)
_results = Query("items", "results_stream", Result)

ANY = Only()


async def seqs(
    conn: Connection,
    *,
    batch: Batch,
    start: int | None = None,
    only: Only = ANY,
    most: int = 1000,
    back: bool = False,
) -> list[int]:
    """Numbers of wanted items from one on (None: the first), upwards or ``back``."""
    query, first = (_seqs_back, batch.total_items) if back else (_seqs, 0)
    rows = await query.all(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        start=first if start is None else start,
        statuses=list(only.statuses) or None,
        codes=list(only.codes) or None,
        most=most,
    )
    return [row.seq for row in rows]


async def numbered(conn: Connection, *, batch: Batch, seqs: Sequence[int]) -> list[Item]:
    """Certain items, in input order."""
    return await _some.all(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        seqs=list(seqs),
    )


async def briefly(conn: Connection, *, batch: Batch, seqs: Sequence[int]) -> list[Brief]:
    """The same without their texts, which are not read."""
    return await _brief.all(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        seqs=list(seqs),
    )


async def named(
    conn: Connection, *, batch: Batch, custom_ids: Sequence[str]
) -> dict[str, list[int]]:
    """The numbers of items by their creator's names, of which several may bear one."""
    found: dict[str, list[int]] = {}
    for row in await _named.all(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        custom_ids=list(custom_ids),
    ):
        found.setdefault(row.custom_id, []).append(row.seq)
    return found


async def first_open(conn: Connection, *, batch: Batch, start: int = 0) -> int | None:
    """The lowest number, from one on, of an item that has not ended; None: all have."""
    row = await _first_open.one_or_none(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        start=start,
    )
    return None if row is None else row.seq


async def attempts(conn: Connection, *, batch: Batch, seq: int) -> list[Attempt]:
    """Every call of an item, oldest first, the one that is out included."""
    return await _attempts.all(
        conn,
        workspace_id=batch.workspace_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        seq=seq,
    )


async def results(
    conn: Connection, *, workspace_id: UUID, batch_id: UUID, batch_day: date
) -> AsyncGenerator[Result]:
    """Every item's result in input order, streamed. Needs an open transaction."""
    async with aclosing(
        _results.stream(conn, workspace_id=workspace_id, batch_id=batch_id, batch_day=batch_day)
    ) as rows:
        async for row in rows:
            yield row
