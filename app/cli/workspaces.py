"""``sluice workspaces``: what the operator of the database does: tenants, first keys, first owners."""

from uuid import UUID

import click

from app import api_keys, settings, tenants
from app import workspaces as people
from app.access import Claims, Role
from app.cli.processes import log_for_person, run_async
from app.cli.store import Store, open_store
from app.db import Connection
from app.errors import UsageError
from app.settings import Settings


def _settings() -> Settings:
    known = settings.load()
    log_for_person(known)
    return known


@click.group()
def workspaces() -> None:
    """Make tenants, their first keys and owners, in the database itself."""


@workspaces.command("list")
def list_workspaces() -> None:
    """List every workspace and environment of the database."""
    with open_store(_settings(), migrating=False) as store:
        places = run_async(_places(store))
    click.echo(f"{'workspace':36}  {'environment':36}  {'keys':>4}  {'members':>7}  names")
    for place in places:
        names = f"{place.workspace} / {place.environment or '-'}"
        environment = str(place.environment_id or "-")
        click.echo(
            f"{place.workspace_id}  {environment:36}  {place.api_keys:>4}  {place.members:>7}  {names}"
        )


async def _places(store: Store) -> list[people.Place]:
    async with store.database("sluice-workspaces") as db, db.connection() as conn:
        return await people.places(conn)


@workspaces.command()
@click.argument("name")
@click.option(
    "--environment", default="default", show_default=True, help="The name of its first environment."
)
@click.option(
    "--owner", help="The user who owns it: sub of their tokens.  [default: nobody, only keys]"
)
def create(name: str, environment: str, owner: str | None) -> None:
    """Make a workspace with an environment and a key to it, whose value is shown this once."""
    known = _settings()
    claims = None if owner is None else _claims(known, owner)
    with open_store(known, migrating=False) as store:
        made, value = run_async(_create(store, name, environment, claims))
    click.echo(f"workspace    {made.workspace_id}\nenvironment  {made.environment_id}")
    click.echo(f"API key      {value}")


async def _create(
    store: Store, name: str, environment: str, owner: Claims | None
) -> tuple[tenants.Environment, str]:
    async with store.database("sluice-workspaces") as db, db.transaction() as conn:
        made = await tenants.create_workspace(conn, name=name, environment=environment)
        if owner is not None:
            await _admit(conn, made.workspace_id, owner, "owner")
        _, value = await api_keys.create(
            conn,
            workspace_id=made.workspace_id,
            environment_id=made.environment_id,
            name="first",
            description="made by the operator",
        )
    return made, value


@workspaces.command()
@click.argument("workspace_id", type=click.UUID)
@click.argument("environment_id", type=click.UUID)
@click.option("--name", default="operator", show_default=True, help="For people.")
def key(workspace_id: UUID, environment_id: UUID, name: str) -> None:
    """Make another key to an environment, when every other one is lost."""
    with open_store(_settings(), migrating=False) as store:
        click.echo(run_async(_key(store, workspace_id, environment_id, name)))


async def _key(store: Store, workspace_id: UUID, environment_id: UUID, name: str) -> str:
    async with store.database("sluice-workspaces") as db, db.transaction() as conn:
        await people.hold_environment(
            conn, workspace_id=workspace_id, environment_id=environment_id
        )
        _, value = await api_keys.create(
            conn,
            workspace_id=workspace_id,
            environment_id=environment_id,
            name=name,
            description="made by the operator",
        )
    return value


@workspaces.command()
@click.argument("workspace_id", type=click.UUID)
@click.argument("subject")
@click.option(
    "--role",
    type=click.Choice(["owner", "member", "read-only"]),
    default="owner",
    show_default=True,
    help="What they may do there.",
)
def admit(workspace_id: UUID, subject: str, role: Role) -> None:
    """Make a user a member of a workspace; SUBJECT is sub of their tokens."""
    known = _settings()
    claims = _claims(known, subject)
    with open_store(known, migrating=False) as store:
        user_id = run_async(_admitted(store, workspace_id, claims, role))
    click.echo(f"{user_id}  {role}")


async def _admitted(store: Store, workspace_id: UUID, claims: Claims, role: Role) -> UUID:
    async with store.database("sluice-workspaces") as db, db.transaction() as conn:
        return await _admit(conn, workspace_id, claims, role)


async def _admit(conn: Connection, workspace_id: UUID, claims: Claims, role: Role) -> UUID:
    user = await people.user_seen(conn, claims=claims)
    await people.admit(conn, workspace_id=workspace_id, user_ids=[user.user_id], role=role, by=None)
    await people.set_role(conn, workspace_id=workspace_id, user_id=user.user_id, role=role)
    return user.user_id


def _claims(known: Settings, subject: str) -> Claims:
    if known.oidc_issuer is None:
        raise UsageError("Users need an issuer: set SLUICE_OIDC_ISSUER and SLUICE_OIDC_AUDIENCE.")
    return Claims(issuer=known.oidc_issuer, subject=subject)
