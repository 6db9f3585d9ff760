"""``sluice report``: print any reporting view, and say who may read them."""

import csv
import importlib
import io
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import click

from app import reports, settings
from app.cli.processes import log_for_person, run_async
from app.cli.upkeep import address
from app.db import Connection, Database
from app.errors import UsageError
from app.reports import Allowance, View

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_TABLE_ROWS: Final = 1000
_CELL: Final = 60
_PARQUET_ROWS: Final = 50_000

Row = tuple[Any, ...]


class _Views(click.Group):
    """Its own commands, and every view by its name."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else _printing(cmd_name)


@click.group(cls=_Views, subcommand_metavar="NAME|COMMAND [ARGS]...")
def report() -> None:
    """Print a reporting view (`sluice report batches --since 24h`), or say who may read them."""


@report.command("list")
def list_views() -> None:
    """List the views and what they show."""

    async def read(conn: Connection) -> Mapping[str, View]:
        return await reports.views(conn)

    for view in _with_database(read).values():
        click.echo(f"{view.name:24}  {(view.about or '').partition(': ')[2] or view.about}")


@report.command()
@click.argument("user")
@click.option("--texts", is_flag=True, help="Prompts and answers too.")
@click.option("--workspace", type=click.UUID, help="The only workspace it sees; else all.")
@click.option(
    "--timeout-s", type=click.IntRange(1), default=300, show_default=True, help="Of a statement."
)
@click.option(
    "--idle-s", type=click.IntRange(1), default=900, show_default=True, help="Of a session."
)
@click.option(
    "--connections", type=click.IntRange(1), default=5, show_default=True, help="At once."
)
def grant(
    user: str, *, texts: bool, workspace: UUID | None, timeout_s: int, idle_s: int, connections: int
) -> None:
    """Let a database USER read the views and nothing else; it is made if it is not there."""
    allowed = Allowance(
        with_texts=texts,
        workspace_id=workspace,
        timeout_s=timeout_s,
        idle_s=idle_s,
        connections=connections,
    )

    async def change(conn: Connection) -> str | None:
        return await reports.grant(conn, user=user, allowed=allowed)

    password = _with_database(change)
    where = "of all workspaces" if workspace is None else f"of workspace {workspace}"
    click.echo(f"'{user}' may read the reports {where}{', texts included' if texts else ''}.")
    if password is not None:
        click.echo(f"Its password, shown once: {password}")


@report.command()
@click.argument("user")
def revoke(user: str) -> None:
    """Let a database USER read nothing any more."""

    async def change(conn: Connection) -> bool:
        return await reports.revoke(conn, user=user)

    if not _with_database(change):
        raise UsageError(f"'{user}' could read nothing.")
    click.echo(f"'{user}' may read nothing any more. The login itself is still there.")


def _with_database(work: Callable[[Connection], Any]) -> Any:  # noqa: ANN401 - whatever it returns
    known = settings.load()
    log_for_person(known)

    async def run(url: str) -> object:
        async with Database(url, size=2) as db, db.transaction() as conn:
            return await work(conn)

    with address(known) as url:
        return run_async(run(url))


# Printing a view ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    name: str
    since: timedelta | None
    where: Mapping[str, str]
    most: int | None
    form: str
    output: Path | None


def _printing(name: str) -> click.Command:
    @click.command(name, help=f"Print the view {name}.")
    @click.option("--since", help="Rows of the last so long, such as 30m, 24h or 7d.")
    @click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="May be given repeatedly.")
    @click.option("--limit", type=click.IntRange(1), help="At most so many rows.")
    @click.option(
        "--format",
        "form",
        type=click.Choice(["table", "csv", "json", "parquet"]),
        default="table",
        show_default=True,
    )
    @click.option(
        "--output", type=click.Path(path_type=Path), help="A file instead of the terminal."
    )
    def show(
        since: str | None,
        where: tuple[str, ...],
        limit: int | None,
        form: str,
        output: Path | None,
    ) -> None:
        conditions: dict[str, str] = {}
        for condition in where:
            column, equals, value = condition.partition("=")
            if not equals:
                raise UsageError(f"--where '{condition}' is not COLUMN=VALUE.")
            conditions[column] = value
        if form == "parquet" and output is None and sys.stdout.isatty():
            raise UsageError("Parquet is not for a terminal; give --output FILE.")
        if form == "parquet":
            _pyarrow()
        wish = _Wish(
            name=name,
            since=None if since is None else _duration(since),
            where=conditions,
            most=limit,
            form=form,
            output=output,
        )

        async def read(conn: Connection) -> None:
            await _print(conn, wish)

        _with_database(read)

    return show


def _duration(text: str) -> timedelta:
    number, unit = text[:-1], text[-1:]
    if not number.isascii() or not number.isdecimal() or unit not in _UNITS or len(number) > 6:  # noqa: PLR2004 - fits any time
        raise UsageError(f"--since '{text}' is no length of time; write it like 30m, 24h or 7d.")
    return timedelta(seconds=int(number) * _UNITS[unit])


async def _print(conn: Connection, wish: _Wish) -> None:
    # One snapshot, and whoever may only read views reads as much.
    await conn.execute("set transaction isolation level repeatable read, read only")
    known = await reports.views(conn)
    view = known.get(wish.name)
    if view is None:
        raise UsageError(f"There is no view '{wish.name}'; there is: {', '.join(known)}.")
    most = wish.most or (_TABLE_ROWS if wish.form == "table" else None)
    found = reports.rows(conn, view=view, since=wish.since, where=wish.where, most=most)
    if wish.form == "parquet":
        await _parquet(view, found, wish.output)
        return
    out = sys.stdout if wish.output is None else wish.output.open("w", encoding="utf-8", newline="")
    try:
        match wish.form:
            case "csv":
                writer = csv.writer(out)
                writer.writerow(column.name for column in view.columns)
                async for row in found:
                    writer.writerow(_text(value) for value in row)
            case "json":
                await _json(view, found, out.write)
            case _:
                await _table(view, found, out.write)
    finally:
        if wish.output is not None:
            out.close()


async def _json(view: View, rows: AsyncIterator[Row], write: Callable[[str], object]) -> None:
    names = [column.name for column in view.columns]
    write("[")
    separator = "\n"
    async for row in rows:
        entry = dict(zip(names, row, strict=True))
        write(f"{separator}  {json.dumps(entry, default=_plain, ensure_ascii=False)}")
        separator = ",\n"
    write("\n]\n")


async def _table(view: View, rows: AsyncIterator[Row], write: Callable[[str], object]) -> None:
    """Columns in which no row has anything, and ids beside names, are left out: a terminal is narrow."""
    found = [row async for row in rows]
    shown = [
        n
        for n, column in enumerate(view.columns)
        if not (column.type == "uuid" and column.name not in _OWN_IDS)
        and any(row[n] is not None for row in found)
    ]
    if not found:
        click.echo("No rows.", err=True)
        return
    cells = [[view.columns[n].name for n in shown]]
    cells += [[_text(row[n])[:_CELL] for n in shown] for row in found]
    widths = [max(len(line[n]) for line in cells) for n in range(len(shown))]
    for line in cells:
        write("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n")


_OWN_IDS: Final = frozenset({"batch_id", "item_id", "worker_id"})


def _plain(value: object) -> object:
    """What JSON has no word for."""
    match value:
        case Decimal():
            return float(value)
        case datetime():
            return _text(value)
        case _:
            return str(value)


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        case bool():
            return "true" if value else "false"
        case dict() | list():
            return json.dumps(value, ensure_ascii=False)
        case Decimal():
            return f"{value.normalize():f}"
        case _:
            return str(value)


# Parquet ------------------------------------------------------------------------------------------


def _pyarrow() -> Any:  # noqa: ANN401 - an optional package without types
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UsageError(
            "Parquet needs a package that is not installed: pip install 'sluice[parquet]'"
        ) from None


async def _parquet(view: View, rows: AsyncIterator[Row], output: Path | None) -> None:
    arrow = _pyarrow()
    schema = arrow.schema(
        [(column.name, _arrow_type(arrow, column.type)) for column in view.columns]
    )
    into: Any = io.BytesIO() if output is None else str(output)
    with arrow.parquet.ParquetWriter(into, schema) as writer:
        part: list[Row] = []
        async for row in rows:
            part.append(row)
            if len(part) == _PARQUET_ROWS:
                writer.write_table(_arrow_table(arrow, schema, part))
                part = []
        writer.write_table(_arrow_table(arrow, schema, part))
    if output is None:
        sys.stdout.buffer.write(into.getvalue())


def _arrow_type(arrow: Any, name: str) -> Any:  # noqa: ANN401 - pyarrow's own
    known = {
        "bigint": arrow.int64(),
        "integer": arrow.int64(),
        "smallint": arrow.int64(),
        "boolean": arrow.bool_(),
        "numeric": arrow.float64(),
        "real": arrow.float64(),
        "double precision": arrow.float64(),
        "timestamp with time zone": arrow.timestamp("us", tz="UTC"),
        "date": arrow.date32(),
    }
    return known.get(name, arrow.string())


def _arrow_table(arrow: Any, schema: Any, rows: Sequence[Row]) -> Any:  # noqa: ANN401 - pyarrow's own
    columns = [
        arrow.array([_arrow_value(row[n]) for row in rows], type=field.type)
        for n, field in enumerate(schema)
    ]
    return arrow.Table.from_arrays(columns, schema=schema)


def _arrow_value(value: object) -> object:
    match value:
        case None | bool() | int() | float() | str() | datetime() | date():
            return value
        case Decimal():
            return float(value)
        case dict() | list():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)
