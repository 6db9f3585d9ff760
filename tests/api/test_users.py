"""Users by their tokens: workspaces, members, environments, and the keys and batches they make."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID

import httpx
import pytest

from app.access import MEMBERS_KEY
from app.db import Database
from app.ids import uuid7
from app.settings import Settings
from tests.api.conftest import Json, Server, Service, server_on, service_on
from tests.issuer import AUDIENCE, RSA_KEYS, FakeIssuer, fake_issuer, published


@dataclass(slots=True, kw_only=True)
class Person:
    """A user with a browser."""

    http: httpx.AsyncClient
    user_id: str
    sub: str

    async def ask(self, method: str, path: str, body: object = None, *, status: int = 200) -> Json:
        answer = await self.http.request(method, f"/v1{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else {}


@pytest.fixture
async def people(shared_server: Server, issuer: FakeIssuer) -> AsyncIterator[list[Person]]:
    """Three who never met."""
    made: list[Person] = []
    for name in ("alice", "bob", "carol"):
        sub = f"{name}-{uuid7().hex}"
        token = issuer.token(sub, name=name.title(), email=f"{name}@example.org")
        http = httpx.AsyncClient(
            base_url=shared_server.url,
            headers={"authorization": f"Bearer {token}"},
            trust_env=False,
            timeout=20,
        )
        me = (await http.get("/v1/user/me")).json()
        made.append(Person(http=http, user_id=me["id"], sub=sub))
    yield made
    for person in made:
        await person.http.aclose()


@pytest.fixture
async def workspace(people: list[Person]) -> Json:
    """Alice's, with Bob as a member and Carol as a reader."""
    alice, bob, carol = people
    made = await alice.ask("POST", "/workspace", {"name": "Alice's"}, status=201)
    at = f"/workspace/{made['workspaceId']}"
    await alice.ask("POST", f"{at}/assign", {"userIds": [bob.user_id]})
    await alice.ask("POST", f"{at}/assign", {"userIds": [carol.user_id], "role": "READ_ONLY"})
    return made


async def environment_of(person: Person, workspace: Json) -> str:
    found = await person.ask("GET", f"/environment/{workspace['workspaceId']}")
    return found[0]["environmentId"]  # pyright: ignore[reportArgumentType] - a list


async def test_a_user_is_known_from_first_sight_on(
    people: list[Person], issuer: FakeIssuer, shared_server: Server
) -> None:
    alice = people[0]
    me = await alice.ask("GET", "/user/me")
    assert me == me | {
        "id": alice.user_id,
        "name": "Alice",
        "email": "alice@example.org",
        "emailVerified": False,
        "state": "ACTIVE",
        "providerType": "oidc",
        "providerId": issuer.url,
        "firstName": None,
    }
    # A token with less leaves what is known; one with other names changes them, not who it is.
    for token, name in (
        (issuer.token(alice.sub), "Alice"),
        (issuer.token(alice.sub, name="Alicia"), "Alicia"),
    ):
        again = await alice.http.get("/v1/user/me", headers={"authorization": f"Bearer {token}"})
        assert (again.json()["id"], again.json()["name"]) == (alice.user_id, name)
        assert again.json()["email"] == "alice@example.org"
    assert (await alice.ask("GET", "/whoami"))["userId"] == alice.user_id
    async with shared_server.db.connection() as conn:
        cursor = await conn.execute("select count(*) from users where subject = %s", (alice.sub,))
        assert await cursor.fetchone() == (1,)


async def test_many_first_sights_at_once_are_one_user(
    shared_server: Server, issuer: FakeIssuer
) -> None:
    headers = {"authorization": f"Bearer {issuer.token(f'dave-{uuid7().hex}')}"}
    async with httpx.AsyncClient(base_url=shared_server.url, trust_env=False) as http:
        seen = await asyncio.gather(*(http.get("/v1/user/me", headers=headers) for _ in range(8)))
    assert {answer.status_code for answer in seen} == {200}
    assert len({answer.json()["id"] for answer in seen}) == 1


async def test_who_makes_a_workspace_owns_it(people: list[Person]) -> None:
    alice, bob, _ = people
    made = await alice.ask(
        "POST", "/workspace", {"name": "W", "description": "d", "environment": "prod"}, status=201
    )
    assert made["role"] == "OWNER"
    listed = await alice.http.get("/v1/workspace")
    assert listed.json() == [made]
    assert (await bob.http.get("/v1/workspace")).json() == []
    environments = (await alice.http.get(f"/v1/environment/{made['workspaceId']}")).json()
    assert [each["name"] for each in environments] == ["prod"]
    at = f"/workspace/{made['workspaceId']}"
    told = await bob.ask("GET", at, status=400)
    assert told["errorCode"] == "WORKSPACE_NOT_MEMBER"
    changed = await alice.ask("PATCH", at, {"name": "Work"})
    assert (changed["name"], changed["description"]) == ("Work", "d")
    assert (await alice.ask("PUT", at, {"description": None}))["description"] is None
    for body in ({}, {"name": ""}, {"name": None}, {"colour": 1}):
        told = await alice.ask("PATCH", at, body, status=400)
        assert told["errorCode"] == "GENERIC_VALIDATION"


async def test_only_the_operator_makes_workspaces_where_it_is_said(database: str) -> None:
    with fake_issuer() as issuer:
        known = Settings(
            port=0,
            oidc_issuer=issuer.url,
            oidc_audience=AUDIENCE,
            users_create_workspaces=False,
        )
        headers = {"authorization": f"Bearer {issuer.token('alice')}"}
        async with (
            Database(database, size=4) as db,
            server_on(db, known) as server,
            httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as http,
        ):
            told = await http.post("/v1/workspace", json={"name": "w"})
            assert told.status_code == 403
            assert "SLUICE_USERS_CREATE_WORKSPACES" in told.json()["errorMessage"]
            assert (await http.get("/v1/workspace")).json() == []


async def test_roles_decide(people: list[Person], workspace: Json) -> None:
    alice, bob, carol = people
    ws = workspace["workspaceId"]
    env = await environment_of(alice, workspace)
    members = (await carol.http.get(f"/v1/workspace/{ws}/members")).json()
    assert [(m["userId"], m["role"], m["addedBy"]) for m in members] == [
        (alice.user_id, "OWNER", alice.user_id),
        (bob.user_id, "MEMBER", alice.user_id),
        (carol.user_id, "READ_ONLY", alice.user_id),
    ]
    assert (await bob.ask("GET", f"/workspace/{ws}"))["role"] == "MEMBER"
    for method, path, body in (
        ("DELETE", f"/workspace/{ws}", None),
        ("POST", f"/workspace/{ws}/assign", {"userIds": [bob.user_id]}),
        ("POST", f"/workspace/{ws}/unassign", {"userIds": [alice.user_id]}),
        ("PUT", f"/workspace/{ws}/members/{bob.user_id}/role", {"role": "OWNER"}),
    ):
        told = await bob.ask(method, path, body, status=403)
        assert told["errorCode"] == "NOT_AUTHORIZED"
        assert told["errorMessage"].startswith("You are not authorized to perform 'workspace")
    await bob.ask("POST", f"/environment/{ws}", {"name": "staging"}, status=201)
    await carol.ask("POST", f"/environment/{ws}", {"name": "mine"}, status=403)
    told = await carol.ask(
        "POST", f"/api-key/{ws}/{env}", {"name": "k", "resources": []}, status=403
    )
    assert told["details"] == {"action": "api-key:create"}
    assert (await carol.http.get(f"/v1/api-key/{ws}/{env}")).json() == []
    users = (await bob.http.get("/v1/user", params={"workspaceId": ws})).json()
    assert {u["id"] for u in users} == {p.user_id for p in people}
    strange = (await bob.http.get("/v1/user", params={"workspaceId": str(uuid7())})).json()
    assert strange == []


async def test_members_come_and_go_but_an_owner_stays(
    people: list[Person], workspace: Json
) -> None:
    alice, bob, carol = people
    at = f"/workspace/{workspace['workspaceId']}"
    for method, path, body in (
        ("POST", f"{at}/unassign", {"userIds": [alice.user_id]}),
        ("PUT", f"{at}/members/{alice.user_id}/role", {"role": "MEMBER"}),
    ):
        told = await alice.ask(method, path, body, status=409)
        assert told["errorCode"] == "WORKSPACE_NEEDS_OWNER"
    unknown = str(uuid7())
    for method, path, body in (
        ("POST", f"{at}/assign", {"userIds": [bob.user_id, unknown]}),
        ("POST", f"{at}/unassign", {"userIds": [bob.user_id, unknown]}),
        ("PUT", f"{at}/members/{unknown}/role", {"role": "member"}),
    ):
        assert (await alice.ask(method, path, body, status=404))["errorCode"] == "USER_NOT_FOUND"
    assert len((await alice.http.get(f"/v1{at}/members")).json()) == 3  # nothing was half done
    wrong: list[Json] = [{}, {"userIds": []}, {"userIds": ["x"]}]
    for body in [*wrong, {"userIds": [unknown], "role": "king"}]:
        await alice.ask("POST", f"{at}/assign", body, status=400)
    await alice.ask("PUT", f"{at}/members/{bob.user_id}/role", {"role": "owner"})
    await bob.ask("POST", f"{at}/unassign", {"userIds": [alice.user_id, carol.user_id]})
    assert (await alice.ask("GET", at, status=400))["errorCode"] == "WORKSPACE_NOT_MEMBER"
    assert [m["userId"] for m in (await bob.http.get(f"/v1{at}/members")).json()] == [bob.user_id]


async def test_two_owners_cannot_remove_each_other(people: list[Person], workspace: Json) -> None:
    alice, bob, _ = people
    at = f"/workspace/{workspace['workspaceId']}"
    await alice.ask("PUT", f"{at}/members/{bob.user_id}/role", {"role": "OWNER"})
    answers = await asyncio.gather(
        alice.http.post(f"/v1{at}/unassign", json={"userIds": [bob.user_id]}),
        bob.http.post(f"/v1{at}/unassign", json={"userIds": [alice.user_id]}),
    )
    assert sorted(a.status_code for a in answers) in ([200, 400], [200, 409])


async def test_environments(people: list[Person], workspace: Json) -> None:
    alice, bob, _ = people
    ws = workspace["workspaceId"]
    made = await bob.ask("POST", f"/environment/{ws}", {"name": "prod"}, status=201)
    at = f"/environment/{ws}/{made['environmentId']}"
    assert await bob.ask("GET", at) == made
    taken = await bob.ask("POST", f"/environment/{ws}", {"name": "prod"}, status=400)
    assert taken["errorCode"] == "ENVIRONMENT_ALREADY_EXISTS"
    assert (await bob.ask("PATCH", at, {"name": "production"}))["name"] == "production"
    taken = await bob.ask("PATCH", at, {"name": "default"}, status=400)
    assert taken["errorCode"] == "ENVIRONMENT_ALREADY_EXISTS"
    key = await alice.ask(
        "POST",
        f"/api-key/{ws}/{made['environmentId']}",
        {"name": "k", "resources": ["*"]},
        status=201,
    )
    headers = {"x-api-key": key["apiKeyValue"]}
    seen = await httpx_get(bob, f"/v1/environment/{ws}", headers)
    assert [e["environmentId"] for e in seen.json()] == [made["environmentId"]]
    assert [w["name"] for w in (await httpx_get(bob, "/v1/workspace", headers)).json()] == [
        "Alice's"
    ]
    refused = await bob.http.delete(f"/v1{at}", headers=headers)
    assert refused.status_code == 403  # a key stays in its environment
    await bob.ask("DELETE", at, status=204)
    assert (await bob.ask("GET", at, status=404))["errorCode"] == "ENVIRONMENT_NOT_FOUND"
    assert (await bob.ask("DELETE", at, status=404))["errorCode"] == "ENVIRONMENT_NOT_FOUND"
    assert (await httpx_get(bob, "/v1/whoami", headers)).status_code == 401
    await bob.ask("POST", f"/environment/{ws}", {"name": "production"}, status=201)


async def httpx_get(person: Person, path: str, headers: dict[str, str]) -> httpx.Response:
    return await person.http.get(path, headers=headers)


async def test_a_deleted_workspace_is_nobodys(people: list[Person], workspace: Json) -> None:
    alice = people[0]
    ws = workspace["workspaceId"]
    env = await environment_of(alice, workspace)
    key = await alice.ask(
        "POST", f"/api-key/{ws}/{env}", {"name": "k", "resources": ["*"]}, status=201
    )
    await alice.ask("DELETE", f"/workspace/{ws}", status=204)
    told = await alice.ask("GET", f"/workspace/{ws}", status=400)
    assert told["errorCode"] == "WORKSPACE_NOT_MEMBER"
    assert (await alice.http.get("/v1/workspace")).json() == []
    answer = await httpx_get(alice, "/v1/whoami", {"x-api-key": key["apiKeyValue"]})
    assert answer.status_code == 401


async def admitted(service: Service, person: Person, role: str) -> None:
    """Into the workspace that the operator made."""
    async with service.db.connection() as conn:
        await conn.execute(
            "insert into workspace_members (workspace_id, user_id, role) values (%s, %s, %s)",
            (service.environment.workspace_id, person.user_id, role),
        )


async def test_a_user_makes_batches_in_their_own_name(
    service: Service, people: list[Person]
) -> None:
    alice, bob, _ = people
    await admitted(service, alice, "owner")
    await admitted(service, bob, "member")
    body = {"type": "ASYNC", "items": [service.item()]}
    made = (await alice.http.post(service.batches, json=body)).json()
    assert (made["createdByUserId"], made["createdByApiKeyId"]) == (alice.user_id, None)
    at = f"{service.batches}/{made['batchId']}"
    shown = (await bob.http.get(at)).json()
    assert shown["createdByApiKey"] is None
    assert (shown["createdByUser"]["id"], shown["createdByUser"]["name"]) == (
        alice.user_id,
        "Alice",
    )
    bare = (await bob.http.get(at, params={"includesUsers": "false"})).json()
    assert "createdByUser" not in bare
    told = (await alice.http.post(f"{service.batches}/estimate", json=body)).json()
    assert told["items"] == 1
    # Whoever made it is told also when they are gone.
    await bob.ask("GET", f"/workspace/{service.environment.workspace_id}")
    async with service.db.connection() as conn:
        await conn.execute("delete from workspace_members where user_id = %s", (alice.user_id,))
    assert (await bob.http.get(at)).json()["createdByUser"]["id"] == alice.user_id
    gone = await alice.http.get(at)
    assert gone.json()["errorCode"] == "WORKSPACE_NOT_MEMBER"


async def test_an_environment_with_unfinished_batches_stays(
    service: Service, people: list[Person]
) -> None:
    alice = people[0]
    await admitted(service, alice, "owner")
    batch = await service.create("one")
    for path in (
        f"/environment/{service.tenant}",
        f"/workspace/{service.environment.workspace_id}",
    ):
        told = await alice.ask("DELETE", path, status=409)
        assert (told["errorCode"], told["details"]) == ("BATCHES_NOT_FINISHED", {"batches": 1})
    await service.work()
    assert (await service.get(f"{service.batches}/{batch['batchId']}"))["status"] == "COMPLETED"
    await alice.ask("DELETE", f"/environment/{service.tenant}", status=204)
    assert (await service.http.get("/v1/whoami")).status_code == 401


async def test_a_batch_that_comes_too_late_is_not_made(
    service: Service, people: list[Person]
) -> None:
    """Its environment is deleted between the door and the commit."""
    alice = people[0]
    await admitted(service, alice, "owner")
    begun = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"type": "ASYNC", "items": ['
        begun.set()
        await deleting
        yield service_item(service) + b"]}"

    async def delete() -> None:
        await begun.wait()
        await alice.ask("DELETE", f"/environment/{service.tenant}", status=204)

    deleting = asyncio.create_task(delete())
    answer = await service.http.post(service.batches, content=slowly())
    assert answer.status_code == 404, answer.text
    assert await service.added() == (0, 0)


def service_item(service: Service) -> bytes:
    return httpx.Request("POST", "http://x", json=service.item()).content


async def test_roles_and_actions_are_told(people: list[Person]) -> None:
    roles = (await people[0].http.get("/v1/role")).json()
    assert [r["name"] for r in roles] == ["owner", "member", "read-only"]
    assert roles[2]["policy"]["statements"][0]["actions"] == ["*:get", "*:list"]
    actions = (await people[0].http.get("/v1/role/permissions")).json()
    by_name = {a["action"]: a["roles"] for a in actions}
    assert by_name["completion-batch:cancel"] == ["owner", "member"]
    assert by_name["workspace:delete"] == ["owner"]


@pytest.mark.parametrize("down", [True, False])
async def test_an_issuer_that_is_away_is_no_fault_of_the_user(database: str, *, down: bool) -> None:
    with fake_issuer() as issuer:
        known = Settings(port=0, oidc_issuer=issuer.url, oidc_audience=AUDIENCE, oidc_timeout_s=2)
        async with (
            Database(database, size=4) as db,
            server_on(db, known) as server,
            service_on(server) as service,
        ):
            headers = {"authorization": f"Bearer {issuer.token('alice')}"}
            if down:
                issuer.stop()
            answer = await service.http.get("/v1/user/me", headers=headers)
            with_key = await service.http.get("/v1/whoami")
            if down:
                issuer.start()
    assert with_key.status_code == 200, "keys do not need the issuer"
    assert answer.status_code == (503 if down else 200)
    if down:
        assert answer.json()["errorCode"] == "ISSUER_UNAVAILABLE"
        assert answer.headers["retry-after"]
        assert "www-authenticate" not in answer.headers


async def test_keys_are_rotated_at_the_issuer(
    people: list[Person], issuer: FakeIssuer, shared_server: Server
) -> None:
    verifier = shared_server.context.issuer
    assert verifier is not None
    verifier._refetch_s = 0.0  # pyright: ignore[reportPrivateUsage] - or the test would wait for it
    try:
        issuer.keys = [published(RSA_KEYS[1], "two"), published(RSA_KEYS[0], "one")]
        token = issuer.token(people[0].sub, key=RSA_KEYS[1], kid="two")
        headers = {"authorization": f"Bearer {token}"}
        me = await people[0].http.get("/v1/user/me", headers=headers)
        assert (me.status_code, me.json()["id"]) == (200, people[0].user_id)
    finally:
        verifier._refetch_s = 10.0  # pyright: ignore[reportPrivateUsage] - as it was


async def test_where_no_issuer_is_configured_tokens_are_unknown_keys(
    lone_service: Service, issuer: FakeIssuer
) -> None:
    headers = {"authorization": f"Bearer {issuer.token('alice')}"}
    answer = await lone_service.http.get("/v1/user/me", headers=headers)
    assert answer.status_code == 401
    assert (await lone_service.http.get("/v1/user/me")).status_code == 403


async def test_a_confined_key_stays_below_users(service: Service, people: list[Person]) -> None:
    """A member's key does the work of an environment; only an owner says more."""
    alice, bob, _ = people
    await admitted(service, alice, "owner")
    await admitted(service, bob, "member")
    at = f"/api-key/{service.tenant}"
    worker = await bob.ask("POST", at, {"name": "w", "resources": ["*"]}, status=201)
    assert worker["permissions"] == list(MEMBERS_KEY)
    assert not any(each.startswith(("api-key", "*")) for each in worker["permissions"])
    assert worker["createdBy"] == bob.user_id
    said = {"name": "w", "resources": ["*"], "permissions": ["*"]}
    told = await bob.ask("POST", at, said, status=403)
    assert "api-key:permit" in told["errorMessage"]
    everything = await alice.ask("POST", at, {"name": "e", "resources": ["*"]}, status=201)
    assert everything["permissions"] == ["*"]
    one = f"{at}/{everything['apiKeyId']}"
    await bob.ask("PATCH", one, {"permissions": ["*:get"]}, status=403)
    await bob.ask("PATCH", one, {"permissions": ["*"], "description": "as it was"})
    # Its value would let him do what he may not.
    await bob.ask("POST", f"{one}/rotate", status=403)
    own = f"{at}/{worker['apiKeyId']}"
    assert (await bob.ask("POST", f"{own}/rotate"))["updatedBy"] == bob.user_id
    assert (await alice.ask("PATCH", own, {"permissions": ["*:get"]}))["permissions"] == ["*:get"]
    await bob.ask("DELETE", one, status=204)
    assert UUID(worker["apiKeyId"])
