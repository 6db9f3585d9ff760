"""The OpenAPI document: Litestar's, completed with what every route has in common.

Refusals are added here and not route by route: whoever adds a route describes what is its own, and
cannot forget that any request may be refused, and how.
"""

from dataclasses import dataclass
from typing import Any, Final, cast

from litestar import Router
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import ScalarRenderPlugin
from litestar.openapi.spec import Components, OpenAPI, SecurityScheme

from app import __version__
from app.api.auth import PUBLIC

_WRITES: Final = frozenset({"post", "put", "patch", "delete"})
_METHODS: Final = _WRITES | {"get", "head", "options", "trace"}

#: What any route below /v1 may answer; the second part, what those may that change something.
_REFUSALS: Final = {
    "400": "Something is wrong with the request; details.errors names each problem with its path",
    "401": "No credential, or one that is unknown, disabled or expired",
    "403": "The caller may not do this",
    "404": "There is no such thing in this workspace",
    "503": "The database does not answer; repeat it after Retry-After seconds",
}
_WRITE_REFUSALS: Final = {
    "409": "The thing is in a state that does not allow this; repeating will not help",
    "413": "The body is larger than the limit that the message names",
    "415": "The body is of another media type",
    "429": "The workspace has as much in the queue as it may; repeat it after Retry-After seconds",
}
#: Path parameters that the guard reads, and of which the framework therefore knows no type.
_TENANT: Final = frozenset({"workspaceId", "environmentId"})

_WORTH_REPEATING: Final = frozenset({"429", "503"})

_REQUEST_ID: Final[dict[str, Any]] = {
    "description": "Names this request in our log; the caller's own if it sent a sane one",
    "schema": {"type": "string"},
}
_RETRY_AFTER: Final[dict[str, Any]] = {
    "description": "Seconds until it is worth repeating",
    "schema": {"type": "integer"},
}


#: What refusals look like where a route does not describe one of another shape.
_ERROR_BODY: Final[dict[str, Any]] = {
    "application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
}


@dataclass
class _Document(OpenAPI):
    """The document; what is common is put in when it is written."""

    prefix: str = ""

    def to_schema(self) -> dict[str, Any]:
        schema = super().to_schema()
        del schema["prefix"]
        _complete(schema, below=f"{self.prefix}/v1/")
        return schema


@dataclass
class Documentation(OpenAPIConfig):
    """How the document is made; ``prefix`` is that of every route."""

    prefix: str = ""

    def to_openapi_schema(self) -> OpenAPI:
        made = super().to_openapi_schema()
        return _Document(
            info=made.info,
            openapi=made.openapi,
            servers=made.servers,
            components=made.components,
            security=made.security,
            tags=made.tags,
            prefix=self.prefix,
        )


def documentation(prefix: str) -> Documentation:
    """The document and its page, for routes below a prefix."""
    return Documentation(
        title="Sluice",
        version=__version__,
        description="Batches of language model requests, within the providers' limits.",
        openapi_router=Router(
            f"{prefix}/docs", route_handlers=[], include_in_schema=False, opt={"action": PUBLIC}
        ),
        prefix=prefix,
        render_plugins=[ScalarRenderPlugin()],
        components=Components(
            security_schemes={
                "apiKey": SecurityScheme(
                    type="apiKey", name="x-api-key", security_scheme_in="header"
                ),
                "bearer": SecurityScheme(type="http", scheme="bearer"),
            }
        ),
        security=[{"apiKey": []}, {"bearer": []}],
    )


def _complete(schema: dict[str, Any], *, below: str) -> None:
    for path, item in schema["paths"].items():
        for method in _METHODS & item.keys():
            operation = cast("dict[str, Any]", item[method])
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in _TENANT:
                    parameter["schema"] = {"type": "string", "format": "uuid"}
            responses = cast("dict[str, dict[str, Any]]", operation.setdefault("responses", {}))
            if path.startswith(below):
                common = _REFUSALS | (_WRITE_REFUSALS if method in _WRITES else {})
                own = [r for s, r in responses.items() if s >= "400" and not _is_litestars(r)]
                shape = own[0]["content"] if own else _ERROR_BODY
                for status, description in common.items():
                    if status not in responses or _is_litestars(responses[status]):
                        responses[status] = {"description": description, "content": shape}
            else:
                operation["security"] = []
            for status, response in responses.items():
                headers = response.setdefault("headers", {})
                headers.setdefault("x-request-id", _REQUEST_ID)
                if status in _WORTH_REPEATING:
                    headers.setdefault("retry-after", _RETRY_AFTER)


def _is_litestars(response: dict[str, Any]) -> bool:
    """Whether it is what Litestar says of a refusal by itself, in a shape that we never send."""
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    return "status_code" in schema.get("properties", {})
