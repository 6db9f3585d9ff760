"""Pages of items: so many, or fewer when they are large, from a number on, upwards or downwards."""

from dataclasses import dataclass
from typing import Final

from app import items
from app.api import wire_batches
from app.api.wire_batches import ItemBody, Shape
from app.batches import Batch
from app.db import Connection
from app.items import ANY, Only

#: Items and bytes at most in one answer.
MOST_ITEMS: Final = 1000
MOST_BYTES: Final = 16 * 1024 * 1024

_FIRST: Final = 2  # enough to see how large they are; each may be of tens of megabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some items. ``after``: where the next page begins; None: there is none."""

    items: list[ItemBody]
    after: int | None

    @property
    def cursor(self) -> str | None:
        """The same as clients see it."""
        return None if self.after is None else str(self.after)


async def read(
    conn: Connection,
    batch: Batch,
    *,
    start: int | None = None,
    only: Only = ANY,
    most: int = MOST_ITEMS,
    back: bool = False,
    shape: Shape = wire_batches.USUAL,
    most_bytes: int | None = None,
) -> Page:
    """Items that are wanted from a number on (``back``: from below it downwards).

    What ceased to be wanted between the two readings is left out.
    """
    limit = MOST_BYTES if most_bytes is None else most_bytes
    numbers = await items.seqs(conn, batch=batch, start=start, only=only, most=most, back=back)
    bodies: list[ItemBody] = []
    size = done = 0
    want = _FIRST
    while done < len(numbers) and size < limit:
        part = numbers[done : done + want]
        rows = await items.numbered(conn, batch=batch, seqs=part)
        rows.sort(key=lambda row: row.seq, reverse=back)
        bodies += [wire_batches.item_body(batch, row, shape=shape) for row in rows if only.has(row)]
        size += sum(len(row.request) + len(row.response or "") for row in rows)
        done += len(part)
        want = max(1, (limit - size) * done // max(size, 1))
    if done < len(numbers) or len(numbers) == most:
        last = numbers[done - 1]
        is_end = last == 0 if back else last + 1 >= batch.total_items
        return Page(items=bodies, after=None if is_end else last if back else last + 1)
    return Page(items=bodies, after=None)
