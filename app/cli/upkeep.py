"""Commands about the database: ``migrate``, ``doctor``, ``explain``, ``db``, ``secrets``."""

import contextlib
import re
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import click
import psycopg

from app import doctor as physician
from app import embedded, rotation, settings
from app import migrate as migrations
from app.cli.processes import log_for_person, run_async
from app.cli.store import Store, open_store
from app.db import folder, statements, unavailable
from app.embedded import Embedded
from app.errors import SecretError, SluiceError, UsageError
from app.secrets import Keyring
from app.settings import Settings

_PARAMETER = re.compile(rb"%\((\w+)\)[sbt]|%%")


@contextlib.contextmanager
def address(known: Settings) -> Generator[str]:
    """The direct address of the database that the settings name; an embedded one runs meanwhile."""
    if known.direct_url is not None:
        yield known.direct_url
        return
    server = embedded.acquire(known.home, version=known.embedded_postgres)
    try:
        yield server.url
    finally:
        server.release()


@click.command()
def migrate() -> None:
    """Bring the database to the schema that this program needs. Safe to repeat, and beside others."""
    known = settings.load()
    log_for_person(known)
    with address(known) as url:
        applied = migrations.migrate(url)
        done = f"applied {', '.join(applied)}" if applied else "nothing was missing"
        click.echo(f"The database is at revision {migrations.head()} ({done}).")


@click.group()
def secrets() -> None:
    """Look after the keys that seal the providers' secrets."""


@secrets.command()
def rotate() -> None:
    """Seal every provider's secret anew with the first key of SLUICE_SECRET_KEY. Safe to repeat.

    Put the new key first and keep the old one behind it; when this has ended with exit code 0, the
    old one may go.
    """
    known = settings.load()
    log_for_person(known)
    with open_store(known, migrating=False) as store:
        done = run_async(_rotate(store))
    click.echo(f"Sealed {done.resealed:,} secrets anew with the key '{store.keyring.key_id}'.")
    for name in done.unreadable:
        click.echo(f"✗ {name}", err=True)
    raise SystemExit(1 if done.unreadable else 0)


async def _rotate(store: Store) -> rotation.Resealed:
    """In steps of one transaction each, so that a rotation that is broken off is gone on with."""
    resealed, unreadable = 0, list[str]()
    step: rotation.Step | None = rotation.Step()
    async with store.database("rotate") as db:
        while step is not None:
            async with db.transaction() as conn:
                done, step = await rotation.reseal(conn, keyring=store.keyring, step=step)
            resealed += done.resealed
            unreadable += done.unreadable
    return rotation.Resealed(resealed=resealed, unreadable=unreadable)


@click.command()
def doctor() -> None:
    """Check a deployment and say what to fix. Exit code 0: all is well, 1: something is not."""
    known = settings.load()
    log_for_person(known)
    with address(known) as url:
        if known.database_url is None:
            migrations.migrate(url)
        try:
            keyring = _keyring(known)
        except SecretError as error:
            click.echo(f"✗ {error}")
            raise SystemExit(1) from None
        found = run_async(physician.examine(known, url=url, keyring=keyring))
    for finding in found:
        click.echo(f"✓ {finding.what}" if finding.is_well else f"✗ {finding.what}")
        if finding.remedy is not None:
            click.echo(f"  → {finding.remedy}")
    raise SystemExit(0 if all(finding.is_well for finding in found) else 1)


def _keyring(known: Settings) -> Keyring | None:
    if known.secret_key is not None:
        return Keyring(known.secret_key)
    file = known.home / "secret-key"
    if known.database_url is None and file.exists():
        return Keyring(file.read_text(encoding="utf-8").strip())
    return None


@click.command()
@click.argument("name")
def explain(name: str) -> None:
    """Show Postgres' plan for a statement of sql/queries, whatever its parameters."""
    known = settings.load()
    log_for_person(known)
    files = sorted(file.stem for file in (folder("sql") / "queries").glob("*.sql"))
    found = {key: sql for file in files for key, sql in statements(file).items()}
    if name not in found:
        close = [key for key in found if name in key] or list(found)
        raise UsageError(
            f"There is no statement '{name}' in sql/queries; there is: {', '.join(close)}."
        )
    with address(known) as url:
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=10) as conn:
                if known.database_url is None:
                    migrations.migrate(url)
                for line in _plan(conn, found[name]):
                    click.echo(line)
        except psycopg.OperationalError as error:
            raise unavailable(url, error) from error
        except psycopg.Error as error:
            raise SluiceError(
                f"Postgres cannot plan {name}: {error.diag.message_primary}"
            ) from error


def _plan(conn: psycopg.Connection, sql: bytes) -> list[str]:
    """The generic plan: what Postgres chooses without knowing the values. Runs nothing."""
    numbers: dict[bytes, int] = {}

    def numbered(found: re.Match[bytes]) -> bytes:
        if found[1] is None:
            return b"%"
        return b"$%d" % numbers.setdefault(found[1], len(numbers) + 1)

    prepared = _PARAMETER.sub(numbered, sql).rstrip().rstrip(b";")
    nulls = b", ".join([b"null"] * len(numbers))
    conn.execute(b"prepare explained as " + prepared)
    conn.execute("set plan_cache_mode = force_generic_plan")
    told = conn.execute(b"explain execute explained" + (b"(" + nulls + b")" if nulls else b""))
    return [str(row[0]) for row in told]


@click.command()
def db() -> None:
    """Run a throw-away Postgres with the schema until Ctrl-C, then remove it."""
    known = settings.load()
    log_for_person(known)
    place = Path(tempfile.mkdtemp(prefix="sluice-db-"))
    # As root the server runs as a user of its own, who must be able to pass through.
    place.chmod(0o711)
    server: Embedded | None = None
    try:
        server = embedded.acquire(
            place / "home",
            version=known.embedded_postgres,
            settings={"fsync": "off", "full_page_writes": "off"},
        )
        migrations.migrate(server.url)
        click.echo(f"{server.url}\nTry: psql '{server.url}'. Ctrl-C ends and removes it.")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    finally:
        if server is not None:
            server.release()
        shutil.rmtree(place, ignore_errors=True)
