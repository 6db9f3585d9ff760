"""Trying items of a batch again: which ones a request means, a new deadline, and doing it.

And what the bodies of a retry and a cancel look like, which are read by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from litestar.openapi.spec import Example, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIType

from app import batches, intake, items
from app.api import described
from app.api.context import Context
from app.api.wire_batches import BatchRetry, problems_of_deadline
from app.batches import Batch, Status
from app.db import Connection, Database
from app.doorbell import EVENTS, WORK
from app.errors import ConflictError, Problem, ValidationError
from app.ids import item_seq

_STEP: Final = 5000
_MOST_CHOSEN: Final = 10_000

#: The error code of failed items that a deadline overtook.
_EXPIRED: Final = "EXPIRED"


@dataclass
class CancelOperation(Operation):
    """Documents the body of a cancel, which may be empty and is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.optional_body(
            described.fields([], running=described.words("abort", "finish")),
            cut=Example(summary="Cut calls in flight", value={"running": "abort"}),
        )


@dataclass
class RetryOperation(Operation):
    """Documents the body of a retry, which may be empty and is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.optional_body(
            described.fields(
                [],
                itemIds=described.texts,
                customIds=described.texts,
                indexes=Schema(type=OpenAPIType.ARRAY, items=described.whole(0, intake.MOST_ITEMS)),
                errorCodes=described.texts,
                statuses=Schema(
                    type=OpenAPIType.ARRAY, items=described.words("FAILED", "EXPIRED", "CANCELLED")
                ),
                completionWindow=described.window,
                expiresAt=described.moment,
            ),
            some=Example(
                summary="What the provider was too busy for", value={"errorCodes": ["server_error"]}
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Redrive:
    """What is to be put back: ``seqs`` and ``codes`` only narrow it (None: any)."""

    statuses: Sequence[Status]
    seqs: Sequence[int] | None
    codes: Sequence[str] | None


async def plan(conn: Connection, batch: Batch, wanted: BatchRetry) -> list[Redrive]:
    """What a request means. Raises ValidationError for unknown items, ConflictError for a state."""
    seqs = await _chosen(conn, batch, wanted)
    if batch.status == "cancelled":
        if "CANCELLED" not in wanted.statuses:
            raise ConflictError(
                f"Completion Batch {batch.batch_id} was cancelled; to let it go on, send "
                '"statuses": ["FAILED", "CANCELLED"].',
                code="BATCH_CANCELLED",
                details={"status": "CANCELLED"},
            )
        if not batch.is_finished:
            raise ConflictError(
                f"Completion Batch {batch.batch_id} is still being cancelled; "
                "try again when its completedAt is set.",
                code="BATCH_NOT_ENDED",
                details={"status": "CANCELLED"},
            )
    codes = None if wanted.error_codes is None else list(wanted.error_codes)
    found: list[Redrive] = []
    if "FAILED" in wanted.statuses:
        found.append(Redrive(statuses=["failed"], seqs=seqs, codes=codes))
    elif "EXPIRED" in wanted.statuses and (codes is None or _EXPIRED in codes):
        found.append(Redrive(statuses=["failed"], seqs=seqs, codes=[_EXPIRED]))
    if "CANCELLED" in wanted.statuses and codes is None:
        found.append(Redrive(statuses=["cancelled"], seqs=seqs, codes=None))
    if batch.status == "cancelled":
        # A cancelled batch takes nothing back but together with cancelled items.
        found = [replace(each, statuses=[*each.statuses, "cancelled"]) for each in found]
    return found


async def _chosen(conn: Connection, batch: Batch, wanted: BatchRetry) -> list[int] | None:
    """The numbers of the items that a request names in any way; None when it names none."""
    ids, names, numbers = wanted.item_ids, wanted.custom_ids, wanted.indexes
    if ids is None and names is None and numbers is None:
        return None
    for path, given in (("itemIds", ids), ("customIds", names), ("indexes", numbers)):
        if len(given or ()) > _MOST_CHOSEN:
            raise ValidationError(
                [Problem(path=path, message=f"must name at most {_MOST_CHOSEN:,} items")]
            )
    known = await items.named(conn, batch=batch, custom_ids=names) if names else {}
    # By what it was called, the numbers of each; empty: it is no item of this batch.
    meant: dict[str, list[int]] = {}
    for position, item_id in enumerate(ids or ()):
        meant[f"itemIds[{position}]"] = _within(batch, item_seq(batch.batch_id, item_id))
    for position, seq in enumerate(numbers or ()):
        meant[f"indexes[{position}]"] = _within(batch, seq)
    for position, name in enumerate(names or ()):
        meant[f"customIds[{position}]"] = known.get(name, [])
    if problems := [
        Problem(path=path, message="is no item of this batch")
        for path, seqs in meant.items()
        if not seqs
    ]:
        raise ValidationError(problems)
    return sorted({seq for seqs in meant.values() for seq in seqs})


def _within(batch: Batch, seq: int | None) -> list[int]:
    return [seq] if seq is not None and 0 <= seq < batch.total_items else []


async def prolong(db: Database, batch: Batch, wanted: BatchRetry, *, now: datetime) -> None:
    """Set the deadline that a retry brings. Raises when it lacks one and the old one has passed."""
    if not wanted.sets_deadline:
        if batch.expires_at is not None and batch.expires_at <= now:
            raise ConflictError(
                f"The deadline of Completion Batch {batch.batch_id} has passed; send a new one with "
                'the retry: "completionWindow", "expiresAt", or "expiresAt": null for none.',
                code="DEADLINE_PASSED",
                details={"expiresAt": batch.expires_at.isoformat()},
            )
        return
    deadline = wanted.deadline(now)
    if problems := problems_of_deadline(deadline, now):
        raise ValidationError(problems)
    async with db.transaction() as conn:
        held = await batches.hold(
            conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id, even_ended=True
        )
        await batches.steer(
            conn,
            workspace_id=batch.workspace_id,
            batch_id=batch.batch_id,
            to=replace(held, expires_at=deadline),
        )


async def carry_out(
    context: Context, batch: Batch, redrives: Sequence[Redrive], *, before: datetime
) -> int:
    """Put the items back, some thousand at a time; how many."""
    total = 0
    for redrive in redrives:
        parts: list[Sequence[int] | None] = [redrive.seqs]
        if redrive.seqs is not None:
            parts = [redrive.seqs[n : n + _STEP] for n in range(0, len(redrive.seqs), _STEP)]
        for part in parts:
            some = 1
            while some:
                async with context.db.transaction() as conn:
                    some = await batches.redrive(
                        conn,
                        workspace_id=batch.workspace_id,
                        batch_id=batch.batch_id,
                        statuses=redrive.statuses,
                        seqs=part,
                        codes=redrive.codes,
                        before=before,
                        most=_STEP,
                    )
                total += some
    if total:
        async with context.db.connection() as conn:
            resources = await batches.resource_ids(
                conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
            )
        context.ringer.ring(WORK, resources)
        context.ringer.ring(EVENTS, [batch.batch_id])
    return total
