"""``sluice run --server``: a server does the work, and this process sends, watches and writes."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final
from uuid import UUID

import click
import msgspec

from app.batches import Status
from app.cli import INTERRUPTED
from app.cli.answers import Tally, write_answers
from app.cli.client import Item, Server
from app.cli.progress import Progress, duration
from app.errors import UsageError
from app.inputs import Input, digest
from app.items import Result

_CHAT: Final = "/v1/chat/completions"
_CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What a server is asked to do with a file."""

    input: Input
    output: Path
    resource: str | None
    base_url: str | None
    model: str | None
    provider_key: str | None
    rpm: int | None
    tpm: int | None
    limit: int | None
    fresh: bool
    max_attempts: int | None


def run_remotely(server: Server, errand: Errand) -> int:
    """Have it done; the exit code. Ctrl-C leaves the server at it."""
    if errand.input.endpoint != _CHAT:
        raise UsageError(
            f"--server takes chat completions; {errand.input.path} is for {errand.input.endpoint}."
            " Run it without --server."
        )
    with server:
        begun = time.monotonic()
        resource = _resource(server, errand)
        run = _key(server, errand, resource)
        # The server remembers idempotency keys for a day, and batches for longer.
        known = server.batches(most=1, metadata=f"run={run}")
        batch_id = (
            known[0].batch_id
            if known
            else server.create_batch(_body(errand, resource, run), idempotency_key=run)
        )
        click.echo(f"Batch {batch_id}", err=True)
        try:
            with Progress() as view:
                server.watch(batch_id, view, clock=time.monotonic)
        except KeyboardInterrupt:
            _say_how_to_go_on(server, batch_id)
            return INTERRUPTED
        tally = asyncio.run(
            write_answers(
                errand.input,
                errand.output,
                _results(server, batch_id),
                most=errand.limit,
                remedy="The answers are safe on the server: run the same command again.",
            )
        )
    _summarize(errand, tally, seconds=time.monotonic() - begun)
    return 0 if tally.answered == tally.rows else 1


def _resource(server: Server, errand: Errand) -> str:
    """The name of the resource to use, made if it was described instead of named."""
    if errand.resource is not None:
        for flag, value in (
            ("--base-url", errand.base_url),
            ("--model", errand.model),
            ("--rpm", errand.rpm),
            ("--tpm", errand.tpm),
        ):
            if value is not None:
                raise UsageError(
                    f"{flag} describes a resource, and --resource names one; not both."
                )
        return errand.resource
    if errand.model is None or errand.base_url is None:
        raise UsageError(
            "Say which model of the server: its name with --resource, or --base-url and --model."
        )
    name = f"{errand.model} at {errand.base_url.rstrip('/')}"
    limits = {"requests": errand.rpm, "tokens": errand.tpm}
    capacity: list[object] = [{"period": "minute", **limits}] if any(limits.values()) else []
    is_new = server.ensure_resource(
        name,
        base_url=errand.base_url,
        model=errand.model,
        key=errand.provider_key,
        capacity=capacity,
    )
    if not is_new and capacity:
        click.echo(f"The resource '{name}' is there already and keeps its limits.", err=True)
    return name


def _key(server: Server, errand: Errand, resource: str) -> str:
    """The same for the same command, so that repeating it finds the batch it made."""
    run = digest(errand.input, model=resource, base_url=server.url)
    rest = f"{errand.input.path.name}\n{errand.limit}\n{errand.max_attempts}"
    fresh = f":{secrets.token_hex(8)}" if errand.fresh else ""
    told = hashlib.sha256(rest.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"run:{run}:{told}{fresh}"


def _body(errand: Errand, resource: str, run: str) -> Iterator[bytes]:
    """The creating request, in chunks."""
    name = errand.input.path.name.encode("utf-8", "replace").decode()
    head: dict[str, object] = {
        "type": "ASYNC",
        "name": name[:200],
        "metadata": {"file": name, "run": run},
    }
    if errand.max_attempts is not None:
        head["maxAttempts"] = errand.max_attempts
    chunk = bytearray(msgspec.json.encode(head)[:-1] + b',"items":[')
    for number, row in enumerate(islice(errand.input.rows(), errand.limit)):
        fields: dict[str, object] = {"resource": resource, "request": msgspec.Raw(row.body)}
        if row.custom_id is not None:
            fields["customId"] = row.custom_id
        chunk += (b"," if number else b"") + msgspec.json.encode(fields)
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk + b"]}")


async def _results(server: Server, batch_id: UUID) -> AsyncIterator[Result]:
    for item in server.items(batch_id):
        yield _result(item)


_STATUS: Final[dict[str, Status]] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "COMPLETED": "completed",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
}


def _result(item: Item) -> Result:
    status_code = item.error_details.status_code if item.error_details else None
    if item.status == "COMPLETED":
        status_code = 200
    return Result(
        seq=item.index,
        status=_STATUS[item.status],
        status_code=status_code,
        response=bytes(item.response.data).decode() if item.response else None,
        error_code=item.error_code,
        error_message=item.error_message,
        custom_id=item.custom_id,
        request_id=None,
    )


def _say_how_to_go_on(server: Server, batch_id: UUID) -> None:
    click.echo(
        "\nDetached; the server goes on. To watch or cancel it:\n"
        f"  sluice batches watch {batch_id} --server {server.url}\n"
        f"  sluice batches cancel {batch_id} --server {server.url}\n"
        "The same command again watches it and writes the answers.",
        err=True,
    )


def _summarize(errand: Errand, tally: Tally, *, seconds: float) -> None:
    click.echo(
        f"Answered {tally.answered:,} of {tally.rows:,} rows in {duration(seconds)}."
        f" Answers: {errand.output}"
    )
    if tally.failed:
        told, rows = tally.reasons.most_common(1)[0]
        click.echo(f"{tally.failed:,} rows failed, most often ({rows:,} times): {told}")
        click.echo("The file says why for each. With --fresh the server does all rows anew.")
