"""``sluice batches``: look at and end the batches of a server."""

import time
from collections.abc import Callable
from uuid import UUID

import click

from app import settings
from app.cli.client import Batch, Server
from app.cli.processes import log_for_person
from app.cli.progress import Progress

_NAME_WIDTH = 30


def _with_server(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--key", help="The server's API key.  [default: that of `sluice up`]")(
        command
    )
    return click.option("--server", help="The server.  [default: http://127.0.0.1:8080]")(command)


def _server(url: str | None, key: str | None) -> Server:
    known = settings.load()
    log_for_person(known)
    return Server.of(known, url, key)


@click.group()
def batches() -> None:
    """Look at, watch and cancel the batches of a server."""


@batches.command("list")
@_with_server
@click.option("--most", type=click.IntRange(1, 100), default=20, show_default=True)
def list_batches(server: str | None, key: str | None, most: int) -> None:
    """List the newest batches."""
    with _server(server, key) as known:
        found = known.batches(most=most)
    if not found:
        click.echo("There are no batches yet.")
        return
    click.echo(
        f"{'batch':36}  {'state':9}  {'done':>17}  {'failed':>7}  created               name"
    )
    for batch in found:
        ended = batch.completed + batch.failed + batch.cancelled
        done = f"{ended:,}/{batch.total_items:,}"
        name = (batch.name or "")[:_NAME_WIDTH]
        click.echo(
            f"{batch.batch_id}  {batch.status.lower():9}  {done:>17}  {batch.failed:>7,}"
            f"  {batch.created_at[:19]}Z  {name}"
        )


@batches.command()
@_with_server
@click.argument("batch_id", type=click.UUID)
def show(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Show one batch."""
    with _server(server, key) as known:
        _tell(known.batch(batch_id))


@batches.command()
@_with_server
@click.argument("batch_id", type=click.UUID)
def cancel(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Cancel a batch: nothing of it is sent any more, calls in flight are let finish."""
    with _server(server, key) as known:
        _tell(known.cancel(batch_id))


@batches.command()
@_with_server
@click.argument("batch_id", type=click.UUID)
def watch(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Follow a batch until it is finished; Ctrl-C stops watching, not the batch.

    Exit code 0: every item was answered, 1: not.
    """
    with _server(server, key) as known, Progress() as view:
        batch = known.watch(batch_id, view, clock=time.monotonic)
    _tell(batch)
    raise SystemExit(0 if batch.completed == batch.total_items else 1)


def _tell(batch: Batch) -> None:
    facts = {
        "batch": str(batch.batch_id),
        "name": batch.name or "",
        "state": batch.status.lower(),
        "items": f"{batch.total_items:,}",
        "answered": f"{batch.completed:,}",
        "failed": f"{batch.failed:,}",
        "cancelled": f"{batch.cancelled:,}",
        "in flight": f"{batch.running:,}",
        "waiting": f"{batch.pending:,}",
        "tokens in": f"{batch.total_prompt_tokens:,}",
        "tokens out": f"{batch.total_output_tokens:,}",
        "created": batch.created_at,
        "completed": batch.completed_at or "",
    }
    for name, value in facts.items():
        if value:
            click.echo(f"{name:10}  {value}")
