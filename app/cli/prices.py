"""``sluice prices``: what models cost. ``sluice keep``: how long a workspace keeps what it has."""

from pathlib import Path
from uuid import UUID

import click

from app import prices as price_list
from app import retention, settings
from app.cli.processes import log_for_person, run_async
from app.cli.upkeep import address
from app.db import Database
from app.errors import InputError, UsageError


@click.group()
def prices() -> None:
    """Import and list the prices of models."""


@prices.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--workspace", type=click.UUID, help="Prices of this workspace only; else everyone's."
)
def import_prices(file: Path, workspace: UUID | None) -> None:
    """Import prices per million tokens from a CSV or JSON FILE.

    Fields: model (* stands for any characters), input, output, and optionally cached, currency (USD), valid_from
    (now). A call costs what counted when it was claimed; what is settled already stays as it is.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The file {file} cannot be read: {error}.") from None
    found = price_list.parse(text)
    if not found:
        raise InputError(f"The file {file} has no prices.")
    known = settings.load()
    log_for_person(known)

    async def store(url: str) -> None:
        async with Database(url, size=2) as db, db.transaction() as conn:
            await price_list.put(conn, found, workspace_id=workspace)

    with address(known) as url:
        run_async(store(url))
    click.echo(f"{len(found)} prices are stored.")


@prices.command("list")
@click.option("--workspace", type=click.UUID, help="Those that concern this workspace; else all.")
def list_prices(workspace: UUID | None) -> None:
    """List prices per million tokens."""
    known = settings.load()
    log_for_person(known)

    async def read(url: str) -> list[price_list.StoredPrice]:
        async with Database(url, size=2) as db, db.connection() as conn:
            return await price_list.known(conn, workspace_id=workspace)

    with address(known) as url:
        found = run_async(read(url))
    if not found:
        click.echo("There are no prices yet; see `sluice prices import --help`.")
        return
    click.echo(
        f"{'model':32}  {'input':>12}  {'cached':>12}  {'output':>12}  cur  valid from            for"
    )
    for price in found:
        cached = "" if price.cached_per_million is None else f"{price.cached_per_million:f}"
        click.echo(
            f"{price.model:32}  {price.input_per_million:>12f}  {cached:>12}"
            f"  {price.output_per_million:>12f}  {price.currency}  {price.valid_from:%Y-%m-%d %H:%M}Z"
            f"     {price.workspace_id or 'everyone'}"
        )


@click.command()
@click.argument("workspace", type=click.UUID)
@click.option("--days", type=click.IntRange(min=1), help="Items, attempts and events.")
@click.option("--texts-days", type=click.IntRange(min=1), help="Prompts and answers.")
def keep(workspace: UUID, days: int | None, texts_days: int | None) -> None:
    """Set how long a WORKSPACE keeps its items and texts; without options, as the settings say."""
    known = settings.load()
    log_for_person(known)

    async def change(url: str) -> bool:
        async with Database(url, size=2) as db, db.transaction() as conn:
            return await retention.keep(
                conn, workspace_id=workspace, days=days, texts_days=texts_days
            )

    with address(known) as url:
        if not run_async(change(url)):
            raise UsageError(f"There is no workspace {workspace}.")
    shown = [
        f"{what} {number} days" if number is not None else f"{what} as the settings say"
        for what, number in (("items", days), ("texts", texts_days))
    ]
    click.echo(f"Workspace {workspace} keeps {' and '.join(shown)}.")
