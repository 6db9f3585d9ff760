"""``sluice keys``: the API keys of a server's environment."""

from uuid import UUID

import click

from app.cli.client import Key
from app.cli.flags import server_of, with_server

_NAME_WIDTH = 30


@click.group()
def keys() -> None:
    """List, make, rotate, disable and delete the API keys of a server."""


@keys.command("list")
@with_server
def list_keys(server: str | None, key: str | None) -> None:
    """List the API keys, newest first."""
    with server_of(server, key) as known:
        found = known.keys()
    click.echo(
        f"{'key':36}  {'value':14}  {'state':8}  {'last used':20}  may                  name"
    )
    for each in found:
        may = ",".join(each.permissions)
        click.echo(
            f"{each.api_key_id}  {each.masked_key:14}  {each.state:8}"
            f"  {_minute(each.last_used_at):20}  {may:20}  {each.name[:_NAME_WIDTH]}"
        )


@keys.command()
@with_server
@click.argument("name")
@click.option(
    "--resource",
    "resources",
    multiple=True,
    type=click.UUID,
    help="A resource that it may use; repeat it for more.  [default: all]",
)
@click.option(
    "--permission",
    "permissions",
    multiple=True,
    help="An action that it may perform, such as completion-batch:create or *:get; repeat it for"
    " more.  [default: those of the key that makes it]",
)
@click.option("--expires", help="When it ends, such as 2030-01-31T00:00:00Z.  [default: never]")
@click.option("--description", help="For people.")
def create(
    server: str | None,
    key: str | None,
    name: str,
    *,
    resources: tuple[UUID, ...],
    permissions: tuple[str, ...],
    expires: str | None,
    description: str | None,
) -> None:
    """Make an API key and print its value, which is shown this once."""
    body: dict[str, object] = {"name": name, "resources": [str(r) for r in resources] or ["*"]}
    if permissions:
        body["permissions"] = list(permissions)
    if expires is not None:
        body["expiresAt"] = expires
    if description is not None:
        body["description"] = description
    with server_of(server, key) as known:
        _tell(known.create_key(body))


@keys.command()
@with_server
@click.argument("key_id", type=click.UUID)
@click.option(
    "--overlap",
    type=click.IntRange(0, 30 * 24 * 3600),
    default=0,
    show_default=True,
    help="For how many seconds its old value still opens.",
)
def rotate(server: str | None, key: str | None, key_id: UUID, overlap: int) -> None:
    """Give an API key a new value and print it; it is shown this once."""
    with server_of(server, key) as known:
        _tell(known.rotate_key(key_id, overlap_s=overlap))


@keys.command()
@with_server
@click.argument("key_id", type=click.UUID)
def disable(server: str | None, key: str | None, key_id: UUID) -> None:
    """Let an API key open nothing until it is enabled again (PATCH)."""
    with server_of(server, key) as known:
        found = known.change_key(key_id, {"enabled": False})
    click.echo(f"{found.api_key_id}  {found.state}  {found.name}")


@keys.command()
@with_server
@click.argument("key_id", type=click.UUID)
def delete(server: str | None, key: str | None, key_id: UUID) -> None:
    """Delete an API key; batches that it made go on."""
    with server_of(server, key) as known:
        known.delete_key(key_id)
    click.echo(f"{key_id}  deleted")


def _tell(made: Key) -> None:
    """The value alone on standard output, for scripts; the rest for people."""
    click.echo(
        f"API key {made.api_key_id} ({made.name}); keep its value, it is not stored:", err=True
    )
    click.echo(made.api_key_value)


def _minute(at: str | None) -> str:
    return "never" if at is None else f"{at[:16]}Z"
