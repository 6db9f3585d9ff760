"""API keys over HTTP: list, change, rotate, delete, and what permissions open."""

import asyncio

import httpx

from app.ids import uuid7
from tests.api.conftest import Json, Service


async def made(service: Service, status: int = 201, **body: object) -> Json:
    given = {"name": "k", "resources": ["*"]} | body
    answer = await service.http.post(f"/v1/api-key/{service.tenant}", json=given)
    assert answer.status_code == status, answer.text
    return answer.json()


def own(key: Json) -> dict[str, str]:
    return {"x-api-key": str(key["apiKeyValue"])}


async def whoami(service: Service, value: object) -> int:
    answer = await service.http.get("/v1/whoami", headers={"x-api-key": str(value)})
    return answer.status_code


async def test_keys_are_listed_newest_first_and_masked(service: Service) -> None:
    keys = [await made(service, name=f"k{number}") for number in range(3)]
    at = f"/v1/api-key/{service.tenant}"
    listed = (await service.http.get(at)).json()
    assert [k["name"] for k in listed] == ["k2", "k1", "k0", "all"]
    assert not any("apiKeyValue" in k for k in listed)
    assert listed[0]["createdBy"] == str(service.key_id)
    further = (await service.http.get(at, params={"cursor": keys[1]["apiKeyId"]})).json()
    assert [k["name"] for k in further] == ["k0", "all"]
    assert (await service.http.get(at, params={"cursor": "x"})).status_code == 400


async def test_a_rotated_key_has_a_new_value_and_the_old_one_for_a_while(service: Service) -> None:
    key = await made(service, labels=["a"])
    at = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}/rotate"
    new = (await service.http.post(at, json={"overlapSeconds": 3600})).json()
    assert new["apiKeyValue"] not in (None, key["apiKeyValue"])
    assert new["maskedKey"] != key["maskedKey"]
    assert (new["labels"], new["apiKeyId"]) == (["a"], key["apiKeyId"])
    assert new["previousValueUntil"] > new["rotatedAt"]
    assert await whoami(service, key["apiKeyValue"]) == 200
    assert await whoami(service, new["apiKeyValue"]) == 200
    # The next rotation ends the overlap of the one before; without a body there is none.
    newest = (await service.http.post(at)).json()
    assert newest["previousValueUntil"] is None
    assert await whoami(service, key["apiKeyValue"]) == 401
    assert await whoami(service, new["apiKeyValue"]) == 401
    assert await whoami(service, newest["apiKeyValue"]) == 200
    for seconds in (-1, 2_592_001, "1", None):
        answer = await service.http.post(at, json={"overlapSeconds": seconds})
        assert answer.status_code == 400, seconds
    assert (await service.http.post(at, content=b"[]")).status_code == 400
    assert (await service.http.post(at, json={})).status_code == 200


async def test_the_overlap_of_a_rotation_ends(service: Service) -> None:
    key = await made(service)
    at = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}/rotate"
    await service.http.post(at, json={"overlapSeconds": 60})
    async with service.db.connection() as conn:
        await conn.execute(
            "update api_keys set previous_until = now() - interval '1 second' where api_key_id = %s",
            (key["apiKeyId"],),
        )
    assert await whoami(service, key["apiKeyValue"]) == 401


async def test_rotations_at_once_leave_one_value(service: Service) -> None:
    key = await made(service)
    at = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}/rotate"
    answers = await asyncio.gather(*(service.http.post(at) for _ in range(4)))
    opened = [await whoami(service, a.json()["apiKeyValue"]) for a in answers]
    assert sorted(opened) == [200, 401, 401, 401]


async def test_a_key_may_rotate_and_delete_itself(service: Service) -> None:
    key = await made(service, resources=[str(service.resource_id)])
    at = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}"
    new = (await service.http.post(f"{at}/rotate", headers=own(key))).json()
    assert (await service.http.delete(at, headers=own(new))).status_code == 204
    assert await whoami(service, new["apiKeyValue"]) == 401


async def test_a_deleted_key_opens_nothing_and_its_batches_still_name_it(service: Service) -> None:
    key = await made(service, name="gone")
    body = {"type": "ASYNC", "items": [service.item()]}
    batch = (await service.http.post(service.batches, json=body, headers=own(key))).json()
    at = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}"
    assert (await service.http.delete(at)).status_code == 204
    assert await whoami(service, key["apiKeyValue"]) == 401
    for method, path in (
        ("GET", at),
        ("PATCH", at),
        ("PUT", at),
        ("DELETE", at),
        ("POST", f"{at}/rotate"),
        ("GET", f"{at}/capacity-usage"),
    ):
        answer = await service.http.request(method, path, json={"enabled": True})
        assert (answer.status_code, answer.json()["errorCode"]) == (404, "API_KEY_NOT_FOUND")
    listed = (await service.http.get(f"/v1/api-key/{service.tenant}")).json()
    assert [k["name"] for k in listed] == ["all"]
    shown = await service.get(f"{service.batches}/{batch['batchId']}")
    assert shown["createdByApiKey"]["name"] == "gone"
    assert shown["createdByApiKey"]["enabled"] is False
    await service.work()
    assert (await service.get(f"{service.batches}/{batch['batchId']}"))["status"] == "COMPLETED"


async def test_permissions_say_what_a_key_may_do(service: Service) -> None:
    key = await made(service, permissions=["completion-batch:create", "*:list"])
    body = {"type": "ASYNC", "items": [service.item()]}
    async with httpx.AsyncClient(base_url=service.url, headers=own(key), trust_env=False) as http:
        batch = await http.post(service.batches, json=body)
        assert batch.status_code == 201
        assert (await http.get(service.batches)).status_code == 200
        at = f"{service.batches}/{batch.json()['batchId']}"
        for method, path, action in (
            ("GET", at, "completion-batch:get"),
            ("GET", f"{at}/events", "completion-batch:get"),
            ("POST", f"{at}/cancel", "completion-batch:cancel"),
            ("PATCH", at, "completion-batch:update"),
            ("POST", f"/v1/api-key/{service.tenant}", "api-key:create"),
        ):
            told = await http.request(method, path, json={})
            assert (told.status_code, told.json()["errorCode"]) == (403, "NOT_AUTHORIZED")
            assert told.json()["details"] == {"action": action}
            assert told.json()["errorMessage"] == (
                f"You are not authorized to perform '{action}' action on"
                f" '{action.split(':')[0]}' resource"
            )
    one = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}"
    changed = await service.http.patch(one, json={"permissions": ["completion-batch:*"]})
    assert changed.json()["permissions"] == ["completion-batch:*"]
    assert (await service.http.post(f"{at}/cancel", headers=own(key))).status_code == 200


async def test_no_key_makes_a_mightier_one(service: Service) -> None:
    maker = await made(service, permissions=["api-key:*", "completion-batch:*"])
    at = f"/v1/api-key/{service.tenant}"
    body = {"name": "k", "resources": ["*"]}
    child = (await service.http.post(at, json=body, headers=own(maker))).json()
    assert child["permissions"] == ["api-key:*", "completion-batch:*"]
    for permissions, status in (
        (["*"], 403),
        (["*:get"], 403),
        (["ai-connection:get"], 403),
        (["completion-batch:get"], 201),
        ([], 201),
    ):
        answer = await service.http.post(
            at, json=body | {"permissions": permissions}, headers=own(maker)
        )
        assert answer.status_code == status, permissions
    everything = f"{at}/{service.key_id}"
    stolen = await service.http.post(f"{everything}/rotate", headers=own(maker))
    assert stolen.status_code == 403
    widened = await service.http.patch(
        f"{at}/{maker['apiKeyId']}", json={"permissions": ["*"]}, headers=own(maker)
    )
    assert widened.status_code == 403
    assert (await service.http.get("/v1/whoami")).status_code == 200
    without = await made(service, permissions=["api-key:create", "completion-batch:*"])
    told = await service.http.post(at, json=body | {"permissions": []}, headers=own(without))
    assert "api-key:permit" in told.json()["errorMessage"]


async def test_permissions_that_mean_nothing_are_refused(service: Service) -> None:
    for wrong in (["completion-batch:invent"], ["Completion-batch:get"], ["a:b:c"], [""], [7], "*"):
        told = await made(service, 400, permissions=wrong)
        assert "permissions" in told["details"]["errors"][0]["path"]
    told = await made(service, 400, permissions=["*"] * 101)
    assert told["errorCode"] == "GENERIC_VALIDATION"


async def test_a_key_can_be_renamed(service: Service) -> None:
    key = await made(service)
    one = f"/v1/api-key/{service.tenant}/{key['apiKeyId']}"
    changed = (await service.http.put(one, json={"name": "new"})).json()
    assert (changed["name"], changed["updatedBy"]) == ("new", str(service.key_id))
    for name in (None, "", "a" * 201):
        assert (await service.http.put(one, json={"name": name})).status_code == 400
    unknown = f"/v1/api-key/{service.tenant}/{uuid7()}"
    assert (await service.http.post(f"{unknown}/rotate")).status_code == 404
