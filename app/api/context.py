"""What every handler is given: one per process."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from app.access import Principal
from app.api.streams import Hub
from app.api.together import Together
from app.batches import Batch
from app.db import Database
from app.doorbell import Ringer
from app.forecast import Clockwork
from app.oidc import Issuer
from app.secrets import Keyring
from app.settings import Settings
from app.validator import Validator


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The process's settings, pool, keys, doorbell, streams and validator of files.

    ``listen_url`` reaches Postgres itself. ``keys_noted``: when the last use of an api key was
    written, by this loop's clock. ``issuer``: who vouches for users, if there is one. ``keys``: who
    calls with a key's value. ``batches``: a batch by its workspace, environment and id.
    """

    settings: Settings
    db: Database
    keyring: Keyring
    listen_url: str
    ringer: Ringer
    hub: Hub
    validator: Validator
    issuer: Issuer | None
    keys: Together[str, Principal | None]
    batches: Together[tuple[UUID, UUID, UUID], Batch | None]
    keys_noted: dict[UUID, float] = field(default_factory=dict[UUID, float])
    chores: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    @property
    def clockwork(self) -> Clockwork:
        """What the claim goes by, for those who look ahead."""
        return Clockwork(
            guard_s=self.settings.guard_s,
            burst_s=self.settings.burst_s,
            dead_after_s=self.settings.dead_after_s,
        )

    def spawn(self, chore: Coroutine[Any, Any, None]) -> None:
        """Let something be done after the answer. It is cancelled when the process stops."""
        task = asyncio.create_task(chore)
        self.chores.add(task)
        task.add_done_callback(self.chores.discard)


Given = NamedDependency[SkipValidation[Context]]
