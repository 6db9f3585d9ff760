"""The OpenAPI document tells the truth: requests made from it, right and wrong ones, never meet a 5xx,
an undocumented status, or an answer that is not as described. Every route of the document is walked."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# schemathesis leaves the types of cases and checks open.

import asyncio
import json
import random
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from app import api_keys, migrate, webhooks
from app.ids import batch_file_id
from tests.api.conftest import Json, Service

#: Requests per route and kind; all of it stays well below a minute.
EXAMPLES = 4

load_all_checks()
_CHECKS: Any = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)


async def document(service: Service) -> Json:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as http:
        return (await http.get("/docs/openapi.json")).json()


class Walk:
    """Calls what a document describes, as a tenant who owns something of everything.

    ``ids`` are real values of path parameters: ``batchId`` is one of several, ``ended`` one whose stream
    ends. They take the place of made-up ones in three of four requests.
    """

    def __init__(
        self, url: str, key: str, told: Json, ids: dict[str, list[str]], ended: str
    ) -> None:
        self._headers = {"x-api-key": key}
        self._url = url
        self._ids = ids
        self._ended = ended
        self._random = random.Random(1)  # noqa: S311 - the same walk every time
        self._schema: Any = schemathesis.openapi.from_dict(told)
        self.walked: dict[str, set[int]] = {}

    def all(self) -> None:
        """Every operation; those that delete come last."""
        operations = [found.ok() for found in self._schema.get_all_operations()]
        for operation in sorted(operations, key=lambda o: o.method.upper() == "DELETE"):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                strategy = operation.as_strategy(generation_mode=mode)

                @seed(1)
                @settings(
                    max_examples=EXAMPLES,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=[
                        HealthCheck.too_slow,
                        HealthCheck.filter_too_much,
                        HealthCheck.data_too_large,
                        HealthCheck.large_base_example,
                    ],
                )
                @given(case=strategy)
                def asked(case: Any) -> None:  # noqa: ANN401 - schemathesis' own types are not complete
                    self._call(case)

                with suppress(Unsatisfiable):  # where nothing is asked, nothing can be wrong
                    asked()

    def _call(self, case: Any) -> None:  # noqa: ANN401 - schemathesis' own types are not complete
        self._make_real(case)
        answer = case.call(base_url=self._url, headers=self._headers, timeout=20)
        self.walked.setdefault(case.operation.label, set()).add(answer.status_code)
        case.validate_response(answer, checks=_CHECKS)

    def _make_real(self, case: Any) -> None:  # noqa: ANN401 - schemathesis' own types are not complete
        """Put what exists in the place of what was made up, so that requests come through doors."""
        streams = "text/event-stream" in json.dumps(case.operation.definition.raw["responses"])
        for name in case.path_parameters or {}:
            tenant = name in ("workspaceId", "environmentId")
            if name in self._ids and (tenant or streams or self._random.random() < 0.75):
                known = [self._ended] if streams and name == "batchId" else self._ids[name]
                case.path_parameters[name] = self._random.choice(known)
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("items"), list):
            if body.get("type") == "SYNC":
                body["type"] = "ASYNC"  # nobody works here: its stream would not end
            for item in body["items"]:
                if isinstance(item, dict) and self._random.random() < 0.75:
                    item.pop("resource", None)
                    item["resourceId"] = self._ids["resourceId"][0]


@pytest.mark.timeout(300)  # a busy machine makes requests slowly
async def test_requests_made_from_the_document_are_answered_as_it_says(
    lone_service: Service,
) -> None:
    told = await document(lone_service)
    # Refused before anything is connected to, so that no sample leaves this machine.
    hook, _ = webhooks.standing(
        lone_service.keyring,
        workspace_id=lone_service.environment.workspace_id,
        environment_id=lone_service.environment.environment_id,
        name="ends",
        url="https://127.0.0.1/",
        event_types=["batch.completed"],
    )
    async with lone_service.db.transaction() as conn:
        await webhooks.add(conn, hook)
    ended = await lone_service.create("a", "b", metadata={"team": "search"})
    one, two = await lone_service.claim()
    await lone_service.settle([one])
    await lone_service.fail([two])
    deliveries = f"{lone_service.batches}/{ended['batchId']}/deliveries"
    (delivery,) = (await lone_service.get(deliveries))["data"]
    waiting = await lone_service.create("c", capacity=[{"period": "minute", "requests": 5}])
    cancelled = await lone_service.create("d")
    await lone_service.http.post(f"{lone_service.batches}/{cancelled['batchId']}/cancel")
    async with lone_service.db.transaction() as conn:
        await conn.execute(
            "create table alembic_version (version_num text)"
        )  # what readyz looks for
        await conn.execute("insert into alembic_version values (%s)", (migrate.head(),))
        # Another key than the one that calls, which some route may well disable.
        other, _ = await api_keys.create(
            conn,
            workspace_id=lone_service.environment.workspace_id,
            environment_id=lone_service.environment.environment_id,
            name="other",
        )
    ids = {
        "workspaceId": [str(lone_service.environment.workspace_id)],
        "environmentId": [str(lone_service.environment.environment_id)],
        "batchId": [b["batchId"] for b in (ended, waiting, cancelled)],
        "itemId": [i["itemId"] for b in (ended, waiting) for i in b["items"]],
        "connectionId": [str(lone_service.connection_id)],
        "resourceId": [str(lone_service.resource_id)],
        "apiKeyId": [str(other)],
        # OpenAI's routes show the same batches, and files of theirs.
        "batch_id": ["batch_" + UUID(b["batchId"]).hex for b in (ended, waiting)],
        "file_id": [
            "file-" + batch_file_id(UUID(ended["batchId"]), kind).hex
            for kind in ("input", "output")
        ],
        "userId": [str(other)],  # there are none where no issuer is configured
        "key": ["team"],
        "deliveryId": [delivery["deliveryId"]],
        "webhookEndpointId": [f"whe_{hook.endpoint_id.hex}"],
    }
    walk = Walk(lone_service.url, lone_service.key, told, ids, ended["batchId"])
    await asyncio.to_thread(walk.all)
    described = {
        f"{method.upper()} {path}" for path, item in told["paths"].items() for method in item
    }
    assert walk.walked.keys() == described
    # The walk reaches what is behind the doors, not only the doors.
    unanswered = [
        label
        for label, statuses in walk.walked.items()
        if label.startswith("GET /v1/") and 200 not in statuses
    ]
    # Those are for users; tests/api/test_users.py asks them with tokens.
    assert unanswered == [
        "GET /v1/workspace/{workspaceId}/members",
        "GET /v1/user/me",
        "GET /v1/user",
    ]


async def test_every_operation_documents_its_refusals(service: Service) -> None:
    told = await document(service)
    for path, item in told["paths"].items():
        for method, operation in item.items():
            responses = operation["responses"]
            assert operation["summary"], path
            assert all("x-request-id" in r["headers"] for r in responses.values())
            if not path.startswith("/v1/"):
                assert operation["security"] == []
                continue
            expected = {"400", "401", "403", "404", "503"}
            expected |= set() if method == "get" else {"409", "413", "429"}
            assert expected <= responses.keys(), f"{method} {path}"
            for status in expected:
                schema = responses[status]["content"]["application/json"]["schema"]
                is_openai_s = path.startswith(("/v1/files", "/v1/batches", "/v1/webhook_"))
                shape = "ErrorAnswer" if is_openai_s else "ErrorBody"
                assert schema == {"$ref": f"#/components/schemas/{shape}"}
            assert "retry-after" in responses["503"]["headers"]
