"""Rotation of the keys that seal secrets: those of connections, callbacks and webhooks alike.

The newest key seals, every configured one opens (app.secrets). An operator puts a new key first,
runs ``reseal`` until nothing is left, and may then take the old key away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.errors import SecretError
from app.secrets import Keyring, Sealed

#: Before the first of all ids.
_NIL = UUID(int=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A sealed secret. ``owner``: whose it is, for people."""

    workspace_id: UUID
    id: UUID
    owner: str
    context: str
    secret_key_id: str
    secret: bytes = field(repr=False)

    def open(self, keyring: Keyring) -> str:
        """What is sealed. Raises SecretError."""
        sealed = Sealed(key_id=self.secret_key_id, ciphertext=self.secret)
        return keyring.open(sealed, context=self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUse:
    """How many stored secrets a key has sealed."""

    secret_key_id: str
    secrets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resealed:
    """What was sealed anew, and which secrets no configured key opens."""

    resealed: int
    unreadable: list[str]


_connections_of_other_keys = Query("rotation", "connection_secrets_of_other_keys", Stored)
_connection_reseal = Query("rotation", "connection_reseal", NoRow)
_endpoints_of_other_keys = Query("rotation", "endpoint_secrets_of_other_keys", Stored)
_endpoint_reseal = Query("rotation", "endpoint_reseal", NoRow)
_secrets_by_key = Query("rotation", "secrets_by_key", KeyUse)
_secrets_stored = Query("rotation", "secrets_stored", Stored)

#: Where secrets are: those that other keys sealed, and how one is replaced.
_PLACES = (
    (_connections_of_other_keys, _connection_reseal),
    (_endpoints_of_other_keys, _endpoint_reseal),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a rotation came: the place, and the last row of it that was seen."""

    place: int = 0
    after: tuple[UUID, UUID] = (_NIL, _NIL)


async def reseal(
    conn: Connection, *, keyring: Keyring, step: Step, most: int = 500
) -> tuple[Resealed, Step | None]:
    """Seal some secrets that older keys sealed with the newest one; where to go on, None: all were seen.

    Those that no configured key opens stay as they are and are named. Whoever uses a secret goes on:
    what is held in the clear has not changed.
    """
    others, replace = _PLACES[step.place]
    workspace_id, last_id = step.after
    rows = await others.all(
        conn,
        key_id=keyring.key_id,
        after_workspace_id=workspace_id,
        after_id=last_id,
        most=most,
    )
    unreadable: list[str] = []
    for row in rows:
        try:
            secret = row.open(keyring)
        except SecretError as error:
            unreadable.append(f"{row.owner} ({row.id}): {error}")
            continue
        sealed = keyring.seal(secret, context=row.context)
        await replace.run(
            conn,
            workspace_id=row.workspace_id,
            id=row.id,
            secret_key_id=sealed.key_id,
            secret=sealed.ciphertext,
        )
    done = Resealed(resealed=len(rows) - len(unreadable), unreadable=unreadable)
    if len(rows) == most:
        return done, Step(place=step.place, after=(rows[-1].workspace_id, rows[-1].id))
    following = step.place + 1
    return done, Step(place=following) if following < len(_PLACES) else None


async def stored(conn: Connection) -> Sequence[Stored]:
    """Every sealed secret."""
    return await _secrets_stored.all(conn)


async def key_uses(conn: Connection) -> list[KeyUse]:
    """Which keys have sealed secrets that are stored, and how many."""
    return await _secrets_by_key.all(conn)
