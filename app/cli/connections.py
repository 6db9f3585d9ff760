"""``sluice connections`` and ``sluice resources``: a server's accounts at providers, and its models."""

import json
from collections.abc import Callable
from typing import Final, cast
from uuid import UUID

import click

from app import settings
from app.cli.batches import server_of, with_server
from app.cli.client import JsonObject, Kind, Server
from app.errors import UsageError

_WIDTH: Final = 30


@click.group()
def connections() -> None:
    """List, make, test and delete a server's accounts at providers."""


@click.group()
def resources() -> None:
    """List, make, test and delete a server's models, which items name."""


# Both ---------------------------------------------------------------------------------------------


@connections.command("list")
@with_server
def list_connections(server: str | None, key: str | None) -> None:
    """List connections."""
    with server_of(server, key) as known:
        _table(known.listed("connection"), "connectionId", _of_connection)


@resources.command("list")
@with_server
def list_resources(server: str | None, key: str | None) -> None:
    """List resources."""
    with server_of(server, key) as known:
        _table(known.listed("resource"), "resourceId", _of_resource)


@connections.command("get")
@with_server
@click.argument("connection_id", type=click.UUID)
def get_connection(server: str | None, key: str | None, connection_id: UUID) -> None:
    """Show one connection as JSON, secrets masked."""
    with server_of(server, key) as known:
        _tell(known.read("connection", connection_id))


@resources.command("get")
@with_server
@click.argument("resource_id", type=click.UUID)
def get_resource(server: str | None, key: str | None, resource_id: UUID) -> None:
    """Show one resource as JSON."""
    with server_of(server, key) as known:
        _tell(known.read("resource", resource_id))


def _delete(server: str | None, key: str | None, kind: Kind, of: UUID, *, force: bool) -> None:
    with server_of(server, key) as known:
        known.remove(kind, of, force=force)
    click.echo(f"Deleted the {kind} {of}.")


@connections.command("delete")
@with_server
@click.argument("connection_id", type=click.UUID)
@click.option("--force", is_flag=True, help="Cancel open batches, and drop what refers to it.")
def delete_connection(
    server: str | None, key: str | None, connection_id: UUID, *, force: bool
) -> None:
    """Delete a connection and its resources; what was answered stays readable."""
    _delete(server, key, "connection", connection_id, force=force)


@resources.command("delete")
@with_server
@click.argument("resource_id", type=click.UUID)
@click.option("--force", is_flag=True, help="Cancel the batches that are still open.")
def delete_resource(server: str | None, key: str | None, resource_id: UUID, *, force: bool) -> None:
    """Delete a resource; what was answered stays readable."""
    _delete(server, key, "resource", resource_id, force=force)


@connections.command("test")
@with_server
@click.argument("connection_id", type=click.UUID)
@click.option("--model", help="Which model to ask.  [default: one that is known]")
def try_connection(
    server: str | None, key: str | None, connection_id: UUID, model: str | None
) -> None:
    """Make one real call and say what is wrong. Exit code 0: it works, 1: it does not."""
    body: JsonObject | None = {"model": model} if model is not None else None
    with server_of(server, key) as known:
        _verdict(known.try_out("connection", connection_id, body))


@resources.command("test")
@with_server
@click.argument("resource_id", type=click.UUID)
def try_resource(server: str | None, key: str | None, resource_id: UUID) -> None:
    """Make one real call with a resource's model. Exit code 0: it works, 1: it does not."""
    with server_of(server, key) as known:
        _verdict(known.try_out("resource", resource_id, None))


# Making them --------------------------------------------------------------------------------------

_RPM: Final = click.option("--rpm", type=click.IntRange(1), help="Most requests per minute.")
_TPM: Final = click.option("--tpm", type=click.IntRange(1), help="Most tokens per minute.")


@connections.command("create")
@with_server
@click.argument("name")
@click.option("--provider", help="Such as openai or anthropic.  [default: openai-compatible]")
@click.option("--base-url", help="Where it is, if not where its provider usually is.")
@click.option(
    "--ask-key/--no-key",
    default=None,
    help="Ask for the provider's key.  [default: OPENAI_API_KEY, if it is set]",
)
@_RPM
@_TPM
def create_connection(
    *,
    server: str | None,
    key: str | None,
    name: str,
    provider: str | None,
    base_url: str | None,
    ask_key: bool | None,
    rpm: int | None,
    tpm: int | None,
) -> None:
    """Make a connection; its id. The provider's key is never an argument, which others could see."""
    secret: str | None = None
    if ask_key:
        secret = click.prompt("Key", hide_input=True)
    elif ask_key is None:
        secret = settings.provider_key()
    body: JsonObject = {"name": name, "capacity": _capacity(rpm, tpm)}
    if secret is not None:
        body["config"] = {"apiKey": secret}
    if provider is not None:
        body["provider"] = provider
    if base_url is not None:
        body["baseUrl"] = base_url
    with server_of(server, key) as known:
        click.echo(known.make("connection", body)["connectionId"])


@resources.command("create")
@with_server
@click.argument("name")
@click.option("--connection", required=True, help="The connection's name or id.")
@click.option("--model", required=True, help="The model's name at the provider.")
@click.option(
    "--fallback",
    multiple=True,
    metavar="CONNECTION=MODEL",
    help="What to ask where it cannot answer; may be repeated.",
)
@_RPM
@_TPM
def create_resource(
    *,
    server: str | None,
    key: str | None,
    name: str,
    connection: str,
    model: str,
    fallback: tuple[str, ...],
    rpm: int | None,
    tpm: int | None,
) -> None:
    """Make a resource; its id."""
    with server_of(server, key) as known:
        ids = _ids(known)
        body: JsonObject = {
            "name": name,
            "model": {"model": model, "connectionId": _id_of(ids, connection)},
            "capacity": _capacity(rpm, tpm),
            "fallbackModels": [
                {"model": other, "connectionId": _id_of(ids, where)}
                for where, _, other in (each.partition("=") for each in fallback)
            ],
        }
        click.echo(known.make("resource", body)["resourceId"])


def _capacity(rpm: int | None, tpm: int | None) -> list[JsonObject]:
    if rpm is None and tpm is None:
        return []
    return [{"period": "minute", "requests": rpm, "tokens": tpm}]


def _ids(known: Server) -> dict[str, str]:
    """Ids of connections by name and by themselves."""
    found: dict[str, str] = {}
    for each in known.listed("connection"):
        own = str(each["connectionId"])
        found |= {str(each["name"]): own, own: own}
    return found


def _id_of(ids: dict[str, str], name: str) -> str:
    if name not in ids:
        raise UsageError(f"There is no connection '{name}'; see `sluice connections list`.")
    return ids[name]


# Showing them -------------------------------------------------------------------------------------


def _of_connection(one: JsonObject) -> str:
    return f"{one['provider']!s:18}  {one['baseUrl']}"


def _of_resource(one: JsonObject) -> str:
    model = cast("JsonObject", one["model"])
    spare = len(cast("list[object]", one["fallbackModels"]))
    return f"{model['model']}" + (f"  (+{spare} fallbacks)" if spare else "")


def _table(rows: list[JsonObject], name: str, rest: Callable[[JsonObject], str]) -> None:
    if not rows:
        click.echo("There are none yet.")
    for row in rows:
        click.echo(f"{row[name]}  {str(row['name'])[:_WIDTH]:{_WIDTH}}  {rest(row)}")


def _tell(one: JsonObject) -> None:
    click.echo(json.dumps(one, indent=2, ensure_ascii=False))


def _verdict(found: JsonObject) -> None:
    ok = found["ok"] is True
    click.echo(
        f"{'✓' if ok else '✗'} {found['message']} ({found['model']}, {found['latencyMs']} ms)"
    )
    if found["remedy"] is not None:
        click.echo(f"  → {found['remedy']}")
    raise SystemExit(0 if ok else 1)
