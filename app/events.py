"""Events of a batch: numbered facts, written by the queue's functions, read by whoever follows."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal
from uuid import UUID

from app.db import Connection, Query

Kind = Literal[
    "batch-created",
    "batch-running",
    "batch-completed",
    "batch-failed",
    "batch-cancelled",
    "item-running",
    "item-completed",
    "item-failed",
    "item-retrying",
    "item-cancelled",
    "batch-paused",
]

#: After one of these nothing follows (unless failed items are put back).
LAST: frozenset[str] = frozenset({"batch-completed", "batch-failed", "batch-cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """The same event of several items, or one of the batch (``seqs`` is None)."""

    first_no: int
    last_no: int
    kind: Kind
    at: datetime
    seqs: list[int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event: its number in the batch, and the item it is about (None: the batch)."""

    no: int
    kind: Kind
    at: datetime
    seq: int | None


_events_after = Query("events", "events_after", EventRow)


async def after(
    conn: Connection,
    *,
    workspace_id: UUID,
    batch_day: date,
    batch_id: UUID,
    number: int,
    most_rows: int = 50,
) -> list[Event]:
    """Events after a number, in order, without gaps; at most those of ``most_rows`` rows."""
    rows = await _events_after.all(
        conn,
        workspace_id=workspace_id,
        batch_day=batch_day,
        batch_id=batch_id,
        after=number,
        most=most_rows,
    )
    return [event for row in rows for event in _each(row) if event.no > number]


def _each(row: EventRow) -> Iterator[Event]:
    if row.seqs is None:
        yield Event(no=row.last_no, kind=row.kind, at=row.at, seq=None)
    else:
        for offset, seq in enumerate(row.seqs):
            yield Event(no=row.first_no + offset, kind=row.kind, at=row.at, seq=seq)
