"""Quotas of a workspace: how much of it may wait in the queue.

They bound what one tenant can pile up: items and batches that have not ended, and the bytes of those
batches' requests. A creation that would exceed one is refused as a whole. What is there already, and what is
put back by a retry, is never refused.
"""

from dataclasses import dataclass
from uuid import UUID

from app.db import Connection, Query
from app.errors import QuotaError, TooLargeError

#: When a refused creation is worth repeating, in seconds: batches end when they end.
RETRY_AFTER_S = 30

CODE = "QUOTA_EXCEEDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """So many items and batches, and so many bytes of requests. As a quota, 0 is any number."""

    items: int
    batches: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    items: int
    batches: int
    bytes: int
    quota_items: int | None
    quota_batches: int | None
    quota_bytes: int | None


_quota_use = Query("quotas", "quota_use", _Use)
_quota_look = Query("quotas", "quota_look", _Use)


async def enforce(
    conn: Connection, *, workspace_id: UUID, default: Amounts, added: Amounts
) -> None:
    """Let the caller's transaction, which has written all of ``added``, commit only within quota.

    Exact: creations of a workspace come here one after the other, each until its commit. Raises
    QuotaError, or TooLargeError when the batch would exceed a quota all by itself.
    """
    use = await _quota_use.one(conn, workspace_id=workspace_id)
    _refuse(use, default, added, already=added)


async def look(conn: Connection, *, workspace_id: UUID, default: Amounts, added: Amounts) -> None:
    """Refuse what is sure to exceed a quota, before any of it is written. Locks nothing."""
    use = await _quota_look.one(conn, workspace_id=workspace_id)
    _refuse(use, default, added, already=Amounts(items=0, batches=0, bytes=0))


def _refuse(use: _Use, default: Amounts, added: Amounts, *, already: Amounts) -> None:
    """``already``: what of ``added`` is part of the use."""
    for name, what, own in (
        ("items", "unfinished items", use.quota_items),
        ("batches", "unfinished batches", use.quota_batches),
        ("bytes", "bytes of unfinished requests", use.quota_bytes),
    ):
        most: int = getattr(default, name) if own is None else own
        asked: int = getattr(added, name)
        used: int = getattr(use, name) - getattr(already, name)
        if not most or used + asked <= most:
            continue
        details: dict[str, object] = {"quota": name, "limit": most, "used": used, "asked": asked}
        setting = f"SLUICE_QUOTA_{name.upper()}"
        if asked > most:
            raise TooLargeError(
                f"This batch alone has {asked:,} {what}, and the workspace may have {most:,} "
                f"({setting}); split the batch.",
                code=CODE,
                details=details,
            )
        raise QuotaError(
            f"The workspace has {used:,} {what}; with {asked:,} more it would exceed its quota of "
            f"{most:,} ({setting}). Repeat this when some have ended.",
            code=CODE,
            details=details,
            retry_after_s=RETRY_AFTER_S,
        )
