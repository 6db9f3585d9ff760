"""``sluice batches``: look at, steer and end the batches of a server."""

import time
from collections.abc import Callable
from uuid import UUID

import click

from app import settings
from app.cli.client import Batch, Server
from app.cli.processes import log_for_person
from app.cli.progress import Progress
from app.errors import UsageError

_NAME_WIDTH = 30


def with_server(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which server and which key."""
    command = click.option("--key", help="The server's API key.  [default: that of `sluice up`]")(
        command
    )
    return click.option("--server", help="The server.  [default: http://127.0.0.1:8080]")(command)


def server_of(url: str | None, key: str | None) -> Server:
    """The server that a command's options name."""
    known = settings.load()
    log_for_person(known)
    return Server.of(known, url, key)


@click.group()
def batches() -> None:
    """Look at, watch, steer and cancel the batches of a server."""


@batches.command("list")
@with_server
@click.option("--most", type=click.IntRange(1, 100), default=20, show_default=True)
def list_batches(server: str | None, key: str | None, most: int) -> None:
    """List the newest batches."""
    with server_of(server, key) as known:
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
@with_server
@click.argument("batch_id", type=click.UUID)
def show(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Show one batch."""
    with server_of(server, key) as known:
        _tell(known.batch(batch_id))


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
def cancel(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Cancel a batch: nothing of it is sent any more, calls in flight are let finish."""
    with server_of(server, key) as known:
        _tell(known.cancel(batch_id))


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
def pause(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Pause a batch: nothing of it is begun, calls in flight are let finish."""
    with server_of(server, key) as known:
        _tell(known.pause(batch_id))


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
def resume(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Let a paused batch go on."""
    with server_of(server, key) as known:
        _tell(known.resume(batch_id))


@batches.command("set")
@with_server
@click.argument("batch_id", type=click.UUID)
@click.option("--priority", type=click.IntRange(-100, 100), help="Higher goes first.")
@click.option(
    "--weight", type=click.FloatRange(0.1, 100), help="Its share among those of its priority."
)
@click.option(
    "--expires",
    help="Its deadline: from now, such as 30m, 24h or 7d; a time such as 2030-01-31T00:00:00Z;"
    " or never.",
)
def set_batch(
    server: str | None,
    key: str | None,
    batch_id: UUID,
    *,
    priority: int | None,
    weight: float | None,
    expires: str | None,
) -> None:
    """Change a running batch's priority, weight or deadline, effective at once."""
    change: dict[str, object] = {}
    if priority is not None:
        change["priority"] = priority
    if weight is not None:
        change["weight"] = weight
    if expires == "never":
        change["expiresAt"] = None
    elif expires is not None:
        change["expiresAt" if "T" in expires else "completionWindow"] = expires
    if not change:
        raise UsageError("Nothing to change; give --priority, --weight or --expires.")
    with server_of(server, key) as known:
        _tell(known.change(batch_id, change))


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
def watch(server: str | None, key: str | None, batch_id: UUID) -> None:
    """Follow a batch until it is finished; Ctrl-C stops watching, not the batch.

    Exit code 0: every item was answered, 1: not.
    """
    with server_of(server, key) as known, Progress() as view:
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
        "priority": str(batch.priority) if batch.priority else "",
        "weight": f"{batch.weight:g}" if batch.weight != 1 else "",
        "created": batch.created_at,
        "deadline": batch.expires_at or "",
        "waits for": "" if batch.waiting_for is None else str(batch.waiting_for),
        "done by": "" if batch.eta is None else str(batch.eta),
        "completed": batch.completed_at or "",
    }
    for name, value in facts.items():
        if value:
            click.echo(f"{name:10}  {value}")
