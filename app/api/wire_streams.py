"""What a slim stream shows of batches and items: ids, states and counts, no texts."""

from typing import cast
from uuid import UUID

from msgspec import UNSET, UnsetType

from app.api.wire import Answer
from app.api.wire_batches import WireStatus
from app.batches import Batch, Status
from app.ids import item_id
from app.items import Brief


class StreamEvent(Answer, kw_only=True, frozen=True):
    """One event of a stream: ``data`` is JSON, ``{"action", "payload"}``, or a terminator.

    ``id`` is the event's number in its batch; progress, errors and terminators have none.
    """

    data: str
    id: str | UnsetType = UNSET


class SlimItem(Answer, kw_only=True, frozen=True):
    """An item without its texts."""

    batch_id: UUID
    item_id: UUID
    index: int
    custom_id: str | None
    resource_id: UUID
    status: WireStatus
    prompt_tokens: int
    output_tokens: int
    error_code: str | None
    retry_count: int


class SlimBatch(Answer, kw_only=True, frozen=True):
    """A batch's state and counts."""

    batch_id: UUID
    status: WireStatus
    total_items: int
    pending: int
    running: int
    completed: int
    failed: int
    cancelled: int
    completed_percentage: float
    total_prompt_tokens: int
    total_output_tokens: int


def slim_item(batch: Batch, item: Brief, *, status: Status) -> SlimItem:
    """An item in the state that an event brought it to."""
    answered = status == "completed"
    return SlimItem(
        batch_id=batch.batch_id,
        item_id=item_id(batch.batch_id, item.seq),
        index=item.seq,
        custom_id=item.custom_id,
        resource_id=item.resource_id,
        status=cast("WireStatus", status.upper()),
        prompt_tokens=(item.input_tokens or 0) if answered else 0,
        output_tokens=(item.output_tokens or 0) if answered else 0,
        error_code=item.error_code if status == "failed" else None,
        retry_count=item.failures,
    )


def slim_batch(batch: Batch) -> SlimBatch:
    """A batch as it is."""
    return SlimBatch(
        batch_id=batch.batch_id,
        status=cast("WireStatus", batch.status.upper()),
        total_items=batch.total_items,
        pending=batch.pending,
        running=batch.running,
        completed=batch.completed,
        failed=batch.failed,
        cancelled=batch.cancelled,
        completed_percentage=round(100 * batch.ended / batch.total_items, 2),
        total_prompt_tokens=batch.input_tokens,
        total_output_tokens=batch.output_tokens,
    )
