"""Health: alive, healthy, ready. The only routes that need no key, beside the documentation."""

import asyncio

import msgspec
import psycopg
from litestar import Response, Router, get
from litestar.openapi.datastructures import ResponseSpec
from psycopg.conninfo import make_conninfo

from app import migrate
from app.api.auth import PUBLIC
from app.api.context import Context, Given
from app.api.errors import ErrorBody, refusal
from app.db import CONNECTION_ERRORS

_PATIENCE_S = 5


class Health(msgspec.Struct):
    """That is all there is to say."""

    status: str = "ok"


@get("/healthz", summary="Alive: the event loop answers", sync_to_thread=False)
def healthz() -> Health:
    return Health()


@get("/healthcheck", summary="The reference's name of the same", sync_to_thread=False)
def healthcheck() -> Health:
    return Health()


@get(
    "/readyz",
    summary="Ready: the database answers and has the schema this program needs",
    responses={
        200: ResponseSpec(Health, description="Ready", generate_examples=False),
        503: ResponseSpec(ErrorBody, description="Not ready, and why", generate_examples=False),
    },
)
async def readyz(context: Given) -> Response[bytes]:
    try:
        at = await asyncio.to_thread(_revision, context)
    except (*CONNECTION_ERRORS, psycopg.Error):
        return refusal(
            503,
            "DATABASE_UNAVAILABLE",
            "The database does not answer.",
            headers={"retry-after": "2"},
        )
    needed = migrate.head()
    if at != needed:
        return refusal(
            503,
            "SCHEMA_OUT_OF_DATE",
            f"The database is at revision {at or 'none'}, this program needs {needed}; "
            "run: sluice migrate",
        )
    return Response(msgspec.json.encode(Health()), media_type="application/json")


def _revision(context: Context) -> str | None:
    return migrate.current(make_conninfo(context.listen_url, connect_timeout=_PATIENCE_S))


router = Router(
    "/",
    route_handlers=[healthz, healthcheck, readyz],
    opt={"action": PUBLIC},
    tags=["Health"],
)
