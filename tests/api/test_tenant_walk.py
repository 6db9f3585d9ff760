"""Every route, whoever must not get through, and nothing of the tenant is shown or changed.

The routes come from the app's own table, so a new one is walked without a word here. It fails this
file when it does not say who may use it, or when its path has an id that ``ids_of`` cannot fill.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from litestar import Litestar, Router, get
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from app import access, api_keys, tenants, webhooks, workspaces
from app.access import Claims
from app.api.auth import ANYONE, PUBLIC, authenticate, require_declared
from app.ids import batch_file_id, uuid7
from app.tenants import Environment
from tests.api.conftest import Service
from tests.issuer import AUDIENCE, RSA_KEYS, FakeIssuer

#: Every text of the tenant has it, so that a leak is seen wherever it shows.
MARK: Final = "VICTIM"

#: What needs neither key nor token. Nothing else may.
OPEN: Final = {"/healthz", "/healthcheck", "/readyz"}

#: Fits the bodies of all routes that have one, so that it is not the body for which they refuse.
BODY: Final[dict[str, Any]] = {
    "name": "n",
    "role": "MEMBER",
    "userIds": [str(uuid7())],
    "event_type": "batch.completed",
}

#: Of a form of their own: what has another form is not found.
NO_UUIDS: Final = {"deliveryId", "webhookEndpointId", "batch_id", "file_id", "key"}

#: Questions that are POSTs; BODY is none of them.
USAGE: Final = ("/v1/request-usage/", "/v1/completion-usage/")

Door = tuple[str, str]


def doors(app: Litestar) -> list[Door]:
    """Every method and path template but health and documentation; what deletes most comes last."""
    return sorted(_doors(app), key=lambda door: (door[0] == "DELETE", -door[1].count("{")))


def _doors(app: Litestar) -> Iterator[Door]:
    for route in app.routes:
        if route.path in OPEN or route.path.startswith("/docs"):
            continue
        assert isinstance(route, HTTPRoute), f"{route.path} is no HTTP route: who guards it?"
        for method in sorted(route.methods - {"OPTIONS"}):
            yield method, route.path


def filled(path: str, ids: dict[str, object]) -> str:
    def one(match: re.Match[str]) -> str:
        assert match[1] in ids, f"{path}: give ids_of an existing {match[1]}"
        return str(ids[match[1]])

    return re.sub(r"\{(\w+)(?::\w+)?\}", one, path)


@dataclass(slots=True, kw_only=True)
class Victim:
    """A tenant with something of everything."""

    service: Service
    issuer: FakeIssuer
    ids: dict[str, object]

    @property
    def workspace_id(self) -> UUID:
        return self.service.environment.workspace_id

    @property
    def doors(self) -> list[Door]:
        return doors(self.service.app)

    async def key(self, *permissions: str, environment: Environment | None = None) -> str:
        """A key of the tenant, or of another one."""
        at = environment or self.service.environment
        async with self.service.db.transaction() as conn:
            _, value = await api_keys.create(
                conn,
                workspace_id=at.workspace_id,
                environment_id=at.environment_id,
                name=f"{MARK} key" if environment is None else "stranger's",
                permissions=permissions or ("*",),
            )
        return value

    async def spoilt_key(self, change: str) -> str:
        value = await self.key()
        async with self.service.db.connection() as conn:
            await conn.execute(
                f"update api_keys set {change} where api_key_id = (select max(api_key_id::text)"  # noqa: S608 - ours
                " from api_keys where workspace_id = %s)::uuid".encode(),
                (self.workspace_id,),
            )
        return value

    async def stranger(self) -> Environment:
        async with self.service.db.transaction() as conn:
            return await tenants.create_workspace(conn, name="other", environment="test")

    async def admit(self, sub: str, role: access.Role, workspace_id: UUID) -> UUID:
        async with self.service.db.transaction() as conn:
            user = await workspaces.user_seen(
                conn, claims=Claims(issuer=self.issuer.url, subject=sub)
            )
            await workspaces.admit(
                conn, workspace_id=workspace_id, user_ids=[user.user_id], role=role, by=None
            )
        return user.user_id

    async def walk(
        self, headers: dict[str, str], ids: dict[str, object] | None = None
    ) -> dict[Door, httpx.Response]:
        """Try every door; the answers. Whatever they are, nothing of the tenant changes."""
        async with self.unchanged():
            return await self.try_all(headers, ids)

    async def try_all(
        self,
        headers: dict[str, str],
        ids: dict[str, object] | None = None,
        some: list[Door] | None = None,
    ) -> dict[Door, httpx.Response]:
        """The same within ``unchanged``; or some of the doors."""
        found: dict[Door, httpx.Response] = {}
        async with httpx.AsyncClient(
            base_url=self.service.url, headers=headers, trust_env=False, timeout=20
        ) as http:
            for method, path in some or self.doors:
                body = None if method == "GET" else BODY
                answer = await http.request(method, filled(path, ids or self.ids), json=body)
                assert answer.status_code < 500, (method, path, answer.text)
                found[method, path] = answer
        assert some or set(found) == set(_doors(self.service.app)), "a route was not walked"
        return found

    @asynccontextmanager
    async def unchanged(self) -> AsyncGenerator[None]:
        """What happens in here changes nothing of the tenant."""
        before = await self.state()
        yield
        assert await self.state() == before, "something of the tenant was changed"

    async def state(self) -> dict[str, object]:
        """Every row of the tenant, table by table, but for when its keys were last used."""
        async with self.service.db.connection() as conn:
            tables = await (
                await conn.execute(
                    "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid"
                    " where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')"
                    " and not c.relispartition and a.attname = 'workspace_id'"
                )
            ).fetchall()
            assert len(tables) > 15
            return {
                name: await (
                    await conn.execute(
                        f"select to_jsonb(t) - 'last_used_at' as row from {name} t"  # noqa: S608 - ours
                        " where workspace_id = %s order by 1".encode(),
                        (self.workspace_id,),
                    )
                ).fetchall()
                for (name,) in tables
            }


async def ids_of(service: Service, user_id: UUID) -> dict[str, object]:
    """Ids of things that do exist in the tenant, by the names that paths give them."""
    hook, _ = webhooks.standing(
        service.keyring,
        workspace_id=service.environment.workspace_id,
        environment_id=service.environment.environment_id,
        name=f"{MARK} webhook",
        url=f"https://127.0.0.1/{MARK}",
        event_types=["batch.completed"],
    )
    async with service.db.transaction() as conn:
        await webhooks.add(conn, hook)
    batch = await service.create(
        f"{MARK} prompt", name=f"{MARK} batch", metadata={"team": f"{MARK} team"}
    )
    await service.work()
    (delivery,) = (await service.get(f"{service.batches}/{batch['batchId']}/deliveries"))["data"]
    file_id = f"file-{batch_file_id(UUID(batch['batchId']), 'output').hex}"
    await service.get(f"/v1/files/{file_id}")  # the first look at a result measures it
    return {
        "workspaceId": service.environment.workspace_id,
        "environmentId": service.environment.environment_id,
        "batchId": batch["batchId"],
        "itemId": batch["items"][0]["itemId"],
        "connectionId": service.connection_id,
        "resourceId": service.resource_id,
        "apiKeyId": service.key_id,
        "userId": user_id,
        "batch_id": f"batch_{UUID(batch['batchId']).hex}",
        "file_id": file_id,
        "key": "team",
        "deliveryId": delivery["deliveryId"],
        "webhookEndpointId": f"whe_{hook.endpoint_id.hex}",
    }


@pytest.fixture
async def victim(service: Service, issuer: FakeIssuer) -> AsyncIterator[Victim]:
    made = Victim(service=service, issuer=issuer, ids={})
    workspace_id = service.environment.workspace_id
    user_id = await made.admit(f"owner of {workspace_id}", "owner", workspace_id)
    async with service.db.connection() as conn:
        for table, column in (
            ("workspaces", "name"),
            ("environments", "name"),
            ("connections", "name"),
            ("resources", "description"),
            ("api_keys", "name"),
        ):
            await conn.execute(
                f"update {table} set {column} = '{MARK} ' || name where workspace_id = %s".encode(),  # noqa: S608 - ours
                (workspace_id,),
            )
        await conn.execute(
            f"update users set name = '{MARK}', email = '{MARK}' where user_id = %s".encode(),  # noqa: S608 - ours
            (user_id,),
        )
    made.ids = await ids_of(service, user_id)
    yield made
    await service.settled_down()


def names_a_tenant(path: str) -> bool:
    return "{workspaceId" in path


def names_a_thing(path: str) -> bool:
    """Something with an id, not a name that any tenant may have."""
    return re.search(r"\{(?!workspaceId|environmentId|key\b)\w+", path) is not None


def names_no_environment(path: str) -> bool:
    """As OpenAI's routes: the key's own is meant, and a user has none."""
    return path.startswith(("/v1/files", "/v1/batches", "/v1/webhook_"))


def code_of(answer: httpx.Response) -> str:
    """The code of a refusal, in our words or in OpenAI's."""
    told = answer.json()
    return told["errorCode"] if "errorCode" in told else told["error"]["code"]


# Declarations -------------------------------------------------------------------------------------


async def test_every_route_says_who_may_use_it_and_nothing_else_is_open(victim: Victim) -> None:
    declared: dict[str, set[str]] = {}
    for route in victim.service.app.routes:
        for handler in getattr(route, "route_handlers", ()):
            if isinstance(handler, HTTPRouteHandler) and handler.http_methods != {"OPTIONS"}:
                declared.setdefault(str(handler.opt["action"]), set()).add(route.path)
    assert {p for p in declared.pop(PUBLIC) if not p.startswith("/docs")} == OPEN
    assert declared.pop(ANYONE) == {"/v1/whoami"}
    unused = set(access.ACTIONS) - set(declared)
    assert unused == {"api-key:permit"}, "an action that no route needs"
    assert len(victim.doors) == len(set(victim.doors)) >= 51


def test_a_route_that_does_not_say_it_keeps_the_api_from_starting() -> None:
    def route(**opt: str) -> HTTPRouteHandler:
        @get("/open", sync_to_thread=False, **opt)  # pyright: ignore[reportArgumentType] - as routes do
        def handler() -> None: ...

        return handler

    def app(handler: HTTPRouteHandler, *, guarded: bool) -> Litestar:
        guards = [authenticate] if guarded else []
        return Litestar([Router("/", route_handlers=[handler], guards=guards)], openapi_config=None)

    for forgot, guarded, said in (
        (route(), True, "action=None"),
        (route(action="completion-batch:invent"), True, "completion-batch:invent"),
        (route(action="completion-batch:get"), False, "guards"),
    ):
        with pytest.raises(RuntimeError, match=said):
            require_declared(app(forgot, guarded=guarded))
    require_declared(app(route(action="completion-batch:get"), guarded=True))
    require_declared(app(route(action=PUBLIC), guarded=False))


# Who is nobody ------------------------------------------------------------------------------------


async def test_nobody_gets_in_without_a_good_key_or_token(victim: Victim) -> None:
    service, issuer = victim.service, victim.issuer
    async with service.db.transaction() as conn:
        rotated_id, rotated = await api_keys.create(
            conn,
            workspace_id=victim.workspace_id,
            environment_id=service.environment.environment_id,
            name=f"{MARK} rotated",
        )
        await api_keys.rotate(
            conn, workspace_id=victim.workspace_id, api_key_id=rotated_id, overlap_s=0, by=None
        )
    bearer = {
        "unknown": "slk_unknown",
        "disabled": await victim.spoilt_key("enabled = false"),
        "expired": await victim.spoilt_key("expires_at = now() - interval '1 second'"),
        "deleted": await victim.spoilt_key("enabled = false, deleted_at = now()"),
        "rotated": rotated,
        "overlap over": await victim.spoilt_key(
            "previous_hash = hash, previous_until = now() - interval '1 second',"
            " hash = sha256(gen_random_uuid()::text::bytea)"
        ),
        "forged token": issuer.token("owner", key=RSA_KEYS[1]),
        "expired token": issuer.token("owner", exp=1),
        "token for others": issuer.token("owner", aud=f"not {AUDIENCE}"),
        "token without signature": issuer.token("owner", key=None, alg="none"),
    }
    everywhere = {"nothing", "unknown", "disabled", "expired", "deleted", "forged token"}
    tried = {name: {"authorization": f"Bearer {value}"} for name, value in bearer.items()}
    tried |= {
        "nothing": {},
        "Basic": {"authorization": f"Basic {service.key}"},
        "Bearer of nothing": {"authorization": "Bearer"},
        "empty x-api-key wins": {"x-api-key": "", "authorization": f"Bearer {service.key}"},
        "unknown x-api-key wins": {"x-api-key": "no", "authorization": f"Bearer {service.key}"},
        "token as x-api-key": {"x-api-key": issuer.token("owner")},
    }
    async with victim.unchanged():
        for name, headers in tried.items():
            # The guard refuses before it looks at the route, so one door stands for all others.
            some = None if name in everywhere else [("GET", "/v1/whoami"), *victim.doors[:2]]
            for door, answer in (await victim.try_all(headers, some=some)).items():
                assert answer.status_code == 401, (name, door, answer.text)
                assert code_of(answer) in ("401", "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
                assert MARK not in answer.text


# Who is somebody, elsewhere -----------------------------------------------------------------------


async def test_a_foreign_key_opens_nothing(victim: Victim) -> None:
    other = await victim.stranger()
    headers = {"x-api-key": await victim.key(environment=other)}
    unknown: dict[str, object] = dict.fromkeys(victim.ids, uuid7())
    refused = await victim.walk(headers)
    same = await victim.walk(headers, unknown)
    for (method, path), answer in refused.items():
        assert MARK not in answer.text, (method, path)
        if names_a_tenant(path):
            assert (answer.status_code, answer.json()["errorCode"]) == (403, "NOT_AUTHORIZED")
            told = same[method, path].json()
            assert told == answer.json(), "a refusal tells whether something exists"
        elif names_a_thing(path):
            assert answer.status_code in (403, 404), (method, path)
    own = victim.ids | {"workspaceId": other.workspace_id, "environmentId": other.environment_id}
    for (method, path), answer in (await victim.walk(headers, own)).items():
        assert MARK not in answer.text, (method, path)
        if names_a_thing(path):
            assert answer.status_code in (403, 404), (method, path, answer.text)


async def test_a_user_who_is_no_member_opens_nothing(victim: Victim) -> None:
    other = await victim.stranger()
    sub = f"owner of {other.workspace_id}"
    await victim.admit(sub, "owner", other.workspace_id)
    headers = {"authorization": f"Bearer {victim.issuer.token(sub)}"}
    unknown: dict[str, object] = dict.fromkeys(victim.ids, uuid7())
    refused = await victim.walk(headers)
    same = await victim.walk(headers, unknown)
    for (method, path), answer in refused.items():
        assert MARK not in answer.text, (method, path)
        if names_a_tenant(path):
            assert (answer.status_code, answer.json()["errorCode"]) == (400, "WORKSPACE_NOT_MEMBER")
            told = same[method, path].json()
            assert told == answer.json(), "a refusal tells whether something exists"
        elif names_a_thing(path):
            assert answer.status_code in (400, 403, 404), (method, path)
    mixed = victim.ids | {"workspaceId": other.workspace_id}
    for (method, path), answer in (await victim.walk(headers, mixed)).items():
        assert MARK not in answer.text, (method, path)
        if "{environmentId" in path:
            assert answer.json()["errorCode"] == "ENVIRONMENT_NOT_FOUND", (method, path)
    other = await victim.stranger()  # the one before was renamed and deleted on the way
    await victim.admit(sub, "owner", other.workspace_id)
    own = victim.ids | {"workspaceId": other.workspace_id, "environmentId": other.environment_id}
    for (method, path), answer in (await victim.walk(headers, own)).items():
        assert MARK not in answer.text, (method, path)
        if names_a_thing(path):
            assert answer.status_code in (400, 404), (method, path, answer.text)


async def test_a_key_of_another_environment_opens_nothing(victim: Victim) -> None:
    async with victim.service.db.transaction() as conn:
        prod = await tenants.create_environment(
            conn, workspace_id=victim.workspace_id, name=f"{MARK} prod"
        )
    there = Environment(workspace_id=victim.workspace_id, environment_id=prod, name="prod")
    headers = {"x-api-key": await victim.key(environment=there)}
    for (method, path), answer in (await victim.walk(headers)).items():
        if "{environmentId" in path:
            assert (answer.status_code, answer.json()["errorCode"]) == (403, "NOT_AUTHORIZED")
            assert MARK not in answer.text, (method, path)
        elif method != "GET":
            assert answer.status_code in (400, 403, 404), (method, path)


# Who may only look --------------------------------------------------------------------------------


async def test_who_may_only_look_changes_nothing_and_sees_everything(victim: Victim) -> None:
    sub = f"reader of {victim.workspace_id}"
    await victim.admit(sub, "read-only", victim.workspace_id)
    for headers in (
        {"x-api-key": await victim.key("*:get", "*:list")},
        {"authorization": f"Bearer {victim.issuer.token(sub)}"},
    ):
        is_user = "authorization" in headers
        for (method, path), answer in (await victim.walk(headers)).items():
            if is_user and names_no_environment(path):
                assert answer.status_code == 400, (method, path, answer.text)
            elif method == "GET":
                people = path.startswith(("/v1/user", "/v1/workspace/{workspaceId:str}/members"))
                expected = 403 if people and not is_user else 200
                assert answer.status_code == expected, (method, path, answer.text)
            elif path.startswith(USAGE):
                assert answer.status_code == 400, (method, path, answer.text)
            elif is_user and path == "/v1/workspace":
                assert answer.status_code == 201  # one of their own
            else:
                assert answer.status_code == 403, (method, path, answer.text)
                assert code_of(answer).upper() == "NOT_AUTHORIZED"
                assert MARK not in answer.text


async def test_a_key_without_permissions_opens_only_the_question_who_it_is(victim: Victim) -> None:
    async with victim.service.db.transaction() as conn:
        _, value = await api_keys.create(
            conn,
            workspace_id=victim.workspace_id,
            environment_id=victim.service.environment.environment_id,
            name="mute",
            permissions=(),
        )
    for (method, path), answer in (await victim.walk({"x-api-key": value})).items():
        expected = 200 if path == "/v1/whoami" else 403
        assert answer.status_code == expected, (method, path)


async def test_ids_that_are_no_uuids_are_a_bad_request(victim: Victim) -> None:
    owner = f"owner of {victim.workspace_id}"
    for headers in (
        {"x-api-key": victim.service.key},
        {"authorization": f"Bearer {victim.issuer.token(owner)}"},
    ):
        async with httpx.AsyncClient(
            base_url=victim.service.url, headers=headers, trust_env=False
        ) as http:
            for method, path in victim.doors:
                for name in set(re.findall(r"\{(\w+)", path)) - NO_UUIDS:
                    ids = victim.ids | {name: "no-uuid"}
                    answer = await http.request(method, filled(path, ids), json=BODY)
                    if answer.status_code == 403:
                        assert "x-api-key" in headers  # what only users may
                        continue
                    assert (answer.status_code, answer.json()["errorCode"]) == (400, "400"), (
                        method,
                        path,
                        name,
                    )
