"""Bring a database to the schema that this program needs, and start new revisions.

A revision is ``migrations/versions/0003_add_x.sql`` with a generated stub beside it. Migrations go
forward only. ``python -m app.migrate "add x"`` (``make migration m="add x"``) starts the next one.
"""

import re
import sys
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import exc

from app.db import folder
from app.errors import DatabaseUnavailableError, SluiceError, UsageError

_MIGRATIONS = folder("migrations")


def _config() -> Config:
    config = Config()
    # alembic interpolates its options: a "%" in a folder's name is doubled.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def head() -> str:
    """The revision that this program needs."""
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    assert newest is not None, f"no revision in {_MIGRATIONS}"
    return newest


def current(url: str) -> str | None:
    """The revision the database is at; None when it was never migrated."""
    with psycopg.connect(url, autocommit=True) as conn:
        try:
            row = conn.execute("select version_num from alembic_version").fetchone()
        except psycopg.errors.UndefinedTable:
            return None
    return None if row is None else str(row[0])


def migrate(url: str) -> list[str]:
    """Apply what is missing, and functions and reporting views anew; return the applied revisions.

    One transaction: all of it or nothing. Safe from several processes at once: one works, the
    others wait and find nothing left to do. ``url`` is a URL or a conninfo string of libpq and
    reaches Postgres itself or a pooler in session mode.
    """
    config = _config()
    config.attributes["url"] = url
    try:
        _refuse_newer(config, url)
        command.upgrade(config, "head")
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
        raise SluiceError(
            "A table or view is in use, so the schema could not be changed and was left as it"
            " was. Repeat when long queries have ended (see pg_stat_activity)."
        ) from error
    except (psycopg.OperationalError, exc.OperationalError) as error:
        raise DatabaseUnavailableError(
            "The database cannot be reached or broke off; the schema was left as it was."
            " Check SLUICE_DATABASE_URL."
        ) from error
    return list(config.attributes.get("applied", []))


def create(message: str) -> Path:
    """Start the next revision: an empty .sql file, returned, with its stub beside it."""
    if not re.search(r"\w", message):
        raise UsageError('Say what the revision does: make migration m="add x"')
    script = ScriptDirectory.from_config(_config())
    number = max((int(r.revision) for r in script.walk_revisions()), default=0) + 1
    made = command.revision(_config(), message, rev_id=f"{number:04d}")
    assert made is not None
    assert not isinstance(made, list)
    file = Path(made.path).with_suffix(".sql")
    file.touch(exist_ok=False)
    return file


def _refuse_newer(config: Config, url: str) -> None:
    """An older program must not touch what a newer one migrated."""
    at = current(url)
    known = {r.revision for r in ScriptDirectory.from_config(config).walk_revisions()}
    if at is not None and at not in known:
        raise SluiceError(
            f"The database is at revision {at}, which this version of Sluice does not know:"
            " a newer one migrated it. Install that version or a newer one."
        )


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{create(' '.join(sys.argv[1:]))}\n")
    except UsageError as error:
        sys.exit(str(error))
