"""Runs the revisions, then applies functions and reporting views again, in one transaction.

Revisions change tables and types. What can be replaced (``sql/functions/``, ``sql/reports/``) is not
a delta: it is applied as it is after every run. ``create or replace view`` refuses to drop or rename
a column, so applying the views keeps the promise they are to their readers.

The URL comes from the caller (``app.migrate``), or from the settings when alembic itself is run.
"""

from typing import cast

import psycopg
from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from psycopg import sql
from sqlalchemy import Connection, NullPool, create_engine

from app import migrate, settings
from app.errors import SettingsError

# Any constant: whoever migrates this database asks for the same lock.
LOCK = 0x51_01_CE


def url() -> str:
    given = context.config.attributes.get("url") or settings.load().direct_url
    if given is None:
        raise SettingsError("Set SLUICE_DATABASE_URL: alembic has no embedded database.")
    return str(given)


def driver(connection: Connection) -> psycopg.Connection:
    """The psycopg connection under SQLAlchemy's: it sends bytes as they are."""
    return cast("psycopg.Connection", connection.connection.driver_connection)


def applied(ctx: MigrationContext, step: MigrationInfo, heads: object, run_args: object) -> None:
    """Tell the caller about a revision; alembic passes everything by name after each."""
    del ctx, heads, run_args
    told = cast("list[str]", context.config.attributes.setdefault("applied", []))
    told.append(str(step.up_revision_id))


def upgrade() -> None:
    # A creator, because a conninfo ("host=/run/pg dbname=x") or a socket URL is no SQLAlchemy URL.
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url()), poolclass=NullPool
    )
    with engine.connect() as connection:
        context.configure(connection=connection, on_version_apply=applied)
        with context.begin_transaction():
            conn = driver(connection)
            # A role's statement_timeout is meant for queries.
            conn.execute("set local statement_timeout = 0")
            # Before alembic reads where the database stands: whoever waited here finds the work
            # done. Waiting for another migration is right, so it comes before lock_timeout.
            conn.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
            # Waiting for a table is not: everyone who comes after the DDL would queue behind it.
            conn.execute("set local lock_timeout = '5s'")
            context.run_migrations()
            for file in migrate.replaced():
                conn.execute(file.read_bytes())
            noted = sql.SQL("comment on table alembic_version is {}")
            conn.execute(noted.format(sql.Literal(migrate.fingerprint())))


if context.is_offline_mode():
    raise SystemExit("Revisions run on a connection; to read their SQL, open migrations/versions.")
upgrade()
