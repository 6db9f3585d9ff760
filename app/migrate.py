"""Bring a database to the schema that this program needs, and start new revisions.

A revision is ``migrations/versions/0003_add_x.sql`` with a generated stub beside it. Migrations go
forward only. ``python -m app.migrate "add x"`` (``make migration m="add x"``) starts the next one.

Revisions change tables; functions and reporting views are applied as they are after every change.
What was applied is noted as a fingerprint on alembic's table, so that a program that finds its own
there has nothing to do and does not even load alembic (half of a command's start-up time).
"""

import hashlib
import re
import sys
from functools import cache
from pathlib import Path

import psycopg

from app.db import folder, unavailable
from app.errors import SluiceError, UsageError

_MIGRATIONS = folder("migrations")


@cache
def _revisions() -> list[str]:
    """The revisions there are, oldest first: the numbers that their files begin with."""
    return sorted(file.stem.split("_")[0] for file in (_MIGRATIONS / "versions").glob("*.sql"))


def replaced() -> list[Path]:
    """The files that are applied anew after every change, in order."""
    return [
        file
        for kind in ("functions", "reports")
        for file in sorted((folder("sql") / kind).glob("*.sql"))
    ]


@cache
def fingerprint() -> str:
    """What this program wants applied: SHA-256 over its revisions, functions and views."""
    digest = hashlib.sha256("\n".join(_revisions()).encode())
    for file in replaced():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def head() -> str:
    """The revision that this program needs."""
    return _revisions()[-1]


def current(url: str) -> str | None:
    """The revision the database is at; None when it was never migrated."""
    return _state(url)[0]


def is_current(url: str) -> bool:
    """Whether tables, functions and views are those of this program."""
    return _state(url)[1] == fingerprint()


def _state(url: str) -> tuple[str | None, str | None]:
    with psycopg.connect(url, autocommit=True) as conn:
        try:
            row = conn.execute(
                "select version_num, obj_description('alembic_version'::regclass)"
                " from alembic_version"
            ).fetchone()
        except psycopg.errors.UndefinedTable:
            return None, None
    return (None, None) if row is None else (str(row[0]), row[1])


def migrate(url: str) -> list[str]:
    """Apply what is missing; return the applied revisions.

    One transaction: all of it or nothing. Safe from several processes at once: one works, the
    others wait and find nothing left to do. ``url`` is a URL or a conninfo string of libpq and
    reaches Postgres itself or a pooler in session mode.
    """
    try:
        at, applied = _state(url)
        if at is not None and at not in _revisions():
            raise SluiceError(
                f"The database is at revision {at}, which this version of Sluice does not know:"
                " a newer one migrated it. Install that version or a newer one."
            )
        return [] if applied == fingerprint() else _upgrade(url)
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
        raise SluiceError(
            "A table or view is in use, so the schema could not be changed and was left as it"
            " was. Repeat when long queries have ended (see pg_stat_activity)."
        ) from error
    except psycopg.OperationalError as error:
        raise unavailable(url, error) from error


def _upgrade(url: str) -> list[str]:
    from alembic import command  # noqa: PLC0415 - slow to load, and rarely needed
    from alembic.config import Config  # noqa: PLC0415
    from sqlalchemy import exc  # noqa: PLC0415

    config = Config()
    # alembic interpolates its options: a "%" in a folder's name is doubled.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["url"] = url
    try:
        command.upgrade(config, "head")
    except exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise error.orig from error
        raise
    return list(config.attributes.get("applied", []))


def create(message: str) -> Path:
    """Start the next revision: an empty .sql file, returned, with its stub beside it."""
    from alembic import command  # noqa: PLC0415 - a developer's command
    from alembic.config import Config  # noqa: PLC0415

    if not re.search(r"\w", message):
        raise UsageError('Say what the revision does: make migration m="add x"')
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    number = int(_revisions()[-1]) + 1
    made = command.revision(config, message, rev_id=f"{number:04d}")
    assert made is not None
    assert not isinstance(made, list)
    file = Path(made.path).with_suffix(".sql")
    file.touch(exist_ok=False)
    return file


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{create(' '.join(sys.argv[1:]))}\n")
    except UsageError as error:
        sys.exit(str(error))
