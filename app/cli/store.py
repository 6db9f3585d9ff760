"""The database that the settings name, embedded or given, and the keys that belong to it."""

import contextlib
import os
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psycopg

from app import api_keys, embedded, migrate, tenants
from app.db import Database, unavailable
from app.embedded import Embedded
from app.errors import SettingsError, SluiceError
from app.secrets import Keyring, load_or_create_key_file
from app.settings import Settings

_GENERATE = "openssl rand -base64 32 | tr +/ -_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An open database and the keyring of its secrets. ``server`` is None unless it is embedded."""

    settings: Settings
    url: str
    direct_url: str
    keyring: Keyring
    server: Embedded | None

    @property
    def give_way(self) -> Callable[[Sequence[int]], None] | None:
        """How backends are made to leave the processor to others, where we may."""
        return self.server.give_way if self.server else None

    def database(self, name: str) -> Database:
        """A pool on it, for ``async with``."""
        revive: Callable[[], None] | None = self.server.ensure_running if self.server else None
        return Database(self.url, size=self.settings.pool_size, revive=revive, name=name)


@contextlib.contextmanager
def open_store(settings: Settings, *, migrating: bool) -> Generator[Store]:
    """The database, brought to this program's schema where that is this process's business.

    An embedded one always is; a given one only when ``migrating``, else it must be there already.
    """
    if settings.database_url is None:
        server = embedded.acquire(settings.home, version=settings.embedded_postgres)
        try:
            migrate.migrate(server.url)
            setting = settings.secret_key or load_or_create_key_file(settings.home / "secret-key")
            yield Store(
                settings=settings,
                url=server.url,
                direct_url=server.url,
                keyring=Keyring(setting),
                server=server,
            )
        finally:
            server.release()
        return
    direct_url = settings.direct_url or settings.database_url
    if settings.secret_key is None:
        raise SettingsError(
            "SLUICE_SECRET_KEY is missing: a database that others may read needs a key that seals"
            f" the providers' keys in it. Make one and keep it: {_GENERATE}"
        )
    keyring = Keyring(settings.secret_key)
    if migrating:
        migrate.migrate(direct_url)
    else:
        _require_schema(direct_url)
    yield Store(
        settings=settings,
        url=settings.database_url,
        direct_url=direct_url,
        keyring=keyring,
        server=None,
    )


def _require_schema(url: str) -> None:
    try:
        if migrate.is_current(url):
            return
        at = migrate.current(url)
    except psycopg.OperationalError as error:
        raise unavailable(url, error) from error
    if at is None:
        raise SluiceError("The database was never migrated. Run: sluice migrate")
    if at < migrate.head():
        raise SluiceError(
            f"The database is at revision {at}; this program needs {migrate.head()}. Run: sluice migrate"
        )
    # Another version's functions, or a newer revision: as during a rolling update. Tables only grow
    # between neighbouring versions, so this program goes on.


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How the first program enters. ``key`` is None when it was shown before and kept by nobody."""

    key: str | None
    workspace_id: UUID
    environment_id: UUID


def bootstrap_key_file(settings: Settings) -> Path:
    """Where an embedded service keeps its first key, so that it can be shown again."""
    return settings.home / "bootstrap-key"


def read_bootstrap_key(settings: Settings) -> str | None:
    """The kept key, or None."""
    try:
        return bootstrap_key_file(settings).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


async def bootstrap(db: Database, store: Store) -> Access:
    """The workspace "default" and a key to it, made at the first start.

    Keys are stored hashed, so a given database shows its first key once. An embedded one belongs
    to this user alone and keeps it in a file of mode 0600.
    """
    kept = read_bootstrap_key(store.settings) if store.server is not None else None
    async with db.transaction() as conn:
        await tenants.lock_setup(conn)
        found = await tenants.environment_named(conn, workspace="default", environment="default")
        made = found or await tenants.create_workspace(
            conn, name="default", environment="default", description="made at the first start"
        )
        known = await api_keys.opened_by(conn, value=kept) if kept is not None else None
        if known is not None:
            return Access(
                key=kept, workspace_id=known.workspace_id, environment_id=known.environment_id
            )
        if store.server is None and await api_keys.exist(
            conn, workspace_id=made.workspace_id, environment_id=made.environment_id
        ):
            return Access(
                key=None, workspace_id=made.workspace_id, environment_id=made.environment_id
            )
        _, key = await api_keys.create(
            conn,
            workspace_id=made.workspace_id,
            environment_id=made.environment_id,
            name="bootstrap",
            description="made at the first start",
        )
        if store.server is not None:
            # Within the transaction: a key that could not be kept is not made either.
            _keep(bootstrap_key_file(store.settings), key)
    return Access(key=key, workspace_id=made.workspace_id, environment_id=made.environment_id)


def _keep(file: Path, key: str) -> None:
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writing:
            writing.write(key + "\n")
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise SluiceError(f"The key file {file} cannot be written: {error.strerror}.") from error
