"""``sluice batches``: look at, steer, end and try again the batches of a server."""

import sys
import time
from pathlib import Path
from uuid import UUID

import click

from app.cli.answers import whole_file
from app.cli.client import Batch
from app.cli.flags import server_of, with_server
from app.cli.progress import Progress
from app.errors import UsageError

_NAME_WIDTH = 30
_STATES = click.Choice(
    ["pending", "running", "completed", "failed", "cancelled"], case_sensitive=False
)


@click.group()
def batches() -> None:
    """Look at, watch, steer, cancel and try again the batches of a server."""


@batches.command("list")
@with_server
@click.option("--most", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option("--status", type=_STATES, help="Only those in this state.")
@click.option("--name", help="Only those with this in their name.")
@click.option("--metadata", metavar="KEY=VALUE", help="Only those with this fact.")
def list_batches(
    server: str | None,
    key: str | None,
    most: int,
    *,
    status: str | None,
    name: str | None,
    metadata: str | None,
) -> None:
    """List the newest batches."""
    with server_of(server, key) as known:
        found = known.batches(most=most, status=status, name=name, metadata=metadata)
    if not found:
        click.echo(
            "There are no such batches."
            if status or name or metadata
            else "There are no batches yet."
        )
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
@click.option("--abort", is_flag=True, help="Cut calls in flight; their answers are lost.")
def cancel(server: str | None, key: str | None, batch_id: UUID, *, abort: bool) -> None:
    """Cancel a batch: nothing of it is sent any more, calls in flight are let finish."""
    with server_of(server, key) as known:
        _tell(known.cancel(batch_id, running="abort" if abort else "finish"))


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
@click.option("--error", "errors", multiple=True, help="Only items with this error; repeatable.")
@click.option(
    "--index", "indexes", multiple=True, type=click.IntRange(0), help="Only this item; repeatable."
)
@click.option("--custom-id", "custom_ids", multiple=True, help="Only this item; repeatable.")
@click.option("--cancelled", is_flag=True, help="Also items that were cancelled.")
@click.option(
    "--expires", help="A new deadline, from now, such as 24h; or never. Needed after the old one."
)
def retry(
    server: str | None,
    key: str | None,
    batch_id: UUID,
    *,
    errors: tuple[str, ...],
    indexes: tuple[int, ...],
    custom_ids: tuple[str, ...],
    cancelled: bool,
    expires: str | None,
) -> None:
    """Try the failed items of a batch again, or some of them; it goes on."""
    which: dict[str, object] = {
        "statuses": ["FAILED", "CANCELLED"] if cancelled else ["FAILED"]
    } | _deadline(expires)
    for name, given in (("errorCodes", errors), ("indexes", indexes), ("customIds", custom_ids)):
        if given:
            which[name] = list(given)
    with server_of(server, key) as known:
        retried, batch = known.retry(batch_id, which)
    items = "item is" if retried == 1 else "items are"
    click.echo(f"{retried:,} {items} tried again." if retried else "There is nothing to try again.")
    _tell(batch)


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
@click.option(
    "--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write.  [default: standard output]",
)
@click.option("--status", type=_STATES, help="Only items in this state.  [default: all that ended]")
@click.option("--after", type=click.IntRange(-1), help="Only items with a higher index.")
def results(
    server: str | None,
    key: str | None,
    batch_id: UUID,
    *,
    form: str,
    output: Path | None,
    status: str | None,
    after: int | None,
) -> None:
    """Write a batch's results so far, in order: JSON lines or CSV.

    While the batch runs, standard error says from where to go on later.
    """
    params = {"format": form}
    if status is not None:
        params["status"] = status
    if after is not None:
        params["after"] = str(after)
    with server_of(server, key) as known:
        if output is None:
            following = known.download(batch_id, params, sys.stdout.buffer.write)
        else:
            with whole_file(output, "Repeat the command.") as file:
                following = known.download(batch_id, params, file.buffer.write)
    if following is not None:
        click.echo(
            f"Not complete: the batch still runs. Go on later with --after {following}.", err=True
        )


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


@batches.command()
@with_server
@click.argument("batch_id", type=click.UUID)
@click.option("--item", type=click.UUID, help="Only those of this item.")
@click.confirmation_option(prompt="Erase prompts and answers for good?")
def erase(server: str | None, key: str | None, batch_id: UUID, item: UUID | None) -> None:
    """Erase the prompts and answers of an ended batch for good; its facts stay."""
    with server_of(server, key) as known:
        known.erase(batch_id, item_id=item)
        _tell(known.batch(batch_id))


@batches.command("set")
@with_server
@click.argument("batch_id", type=click.UUID)
@click.option("--priority", type=click.IntRange(-100, 100), help="Higher goes first.")
@click.option(
    "--weight", type=click.FloatRange(0.1, 100), help="Its share among those of its priority."
)
@click.option("--max-tokens", type=click.IntRange(1), help="It pauses when so many are used.")
@click.option(
    "--max-cost", type=click.FloatRange(0, min_open=True), help="It pauses when so much is spent."
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
    max_tokens: int | None,
    max_cost: float | None,
    expires: str | None,
) -> None:
    """Change a running batch's priority, weight, deadline or what it may use, effective at once."""
    change: dict[str, object] = {}
    if priority is not None:
        change["priority"] = priority
    if weight is not None:
        change["weight"] = weight
    change |= _deadline(expires)
    if max_tokens is not None:
        change["maxTokens"] = max_tokens
    if max_cost is not None:
        change["maxCost"] = max_cost
    if not change:
        raise UsageError(
            "Nothing to change; give --priority, --weight, --max-tokens, --max-cost or --expires."
        )
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


def _deadline(expires: str | None) -> dict[str, object]:
    """A flag as the API takes it."""
    if expires is None:
        return {}
    if expires == "never":
        return {"expiresAt": None}
    return {"expiresAt" if "T" in expires else "completionWindow": expires}


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
        "cost": "" if batch.total_cost is None else f"{batch.total_cost:g} {batch.currency}",
        "priority": str(batch.priority) if batch.priority else "",
        "weight": f"{batch.weight:g}" if batch.weight != 1 else "",
        "created": batch.created_at,
        "deadline": batch.expires_at or "",
        "paused": "" if batch.pause_reason is None else batch.pause_reason.message,
        "waits for": "" if batch.waiting_for is None else str(batch.waiting_for),
        "done by": "" if batch.eta is None else str(batch.eta),
        "completed": batch.completed_at or "",
    }
    for name, value in facts.items():
        if value:
            click.echo(f"{name:10}  {value}")
