"""Descriptions, for OpenAPI, of bodies that handlers read by hand."""

from collections.abc import Sequence

from litestar.openapi.spec import Example, OpenAPIMediaType, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType

text = Schema(type=OpenAPIType.STRING)
texts = Schema(type=OpenAPIType.ARRAY, items=text)
flag = Schema(type=OpenAPIType.BOOLEAN)
moment = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.DATE_TIME)
record = Schema(type=OpenAPIType.OBJECT)


def whole(least: int, most: int) -> Schema:
    """A whole number."""
    return Schema(type=OpenAPIType.INTEGER, minimum=least, maximum=most)


def fields(required: Sequence[str], **properties: Schema) -> Schema:
    """An object with these fields."""
    return Schema(type=OpenAPIType.OBJECT, required=list(required), properties=dict(properties))


def capacity() -> Schema:
    """Limits."""
    amount = Schema(type=OpenAPIType.INTEGER, minimum=0, description="null or 0: any number")
    entry = fields(
        ["period"],
        period=Schema(
            type=OpenAPIType.STRING, enum=["minute", "hour", "day", "week", "month", "lifetime"]
        ),
        requests=amount,
        tokens=amount,
        inputTokens=amount,
        outputTokens=amount,
        window=Schema(type=OpenAPIType.STRING, enum=["sliding", "calendar"]),
        dimension=Schema(type=OpenAPIType.STRING, enum=["source-ip", "metadata"]),
        dimensionField=text,
        enabled=flag,
    )
    return Schema(type=OpenAPIType.ARRAY, items=entry)


def callback_options() -> Schema:
    """Where a CALLBACK batch tells of itself."""
    topics = ["item_update", "batch_update", "item_running", "all"]
    return fields(
        ["url"],
        url=Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.URL),
        headers=record,
        events=Schema(
            type=OpenAPIType.ARRAY, items=Schema(type=OpenAPIType.STRING, enum=topics), min_items=1
        ),
        secret=Schema(
            type=OpenAPIType.STRING,
            description="whsec_ and the base64 of 24 to 64 bytes; absent: one is made and shown once",
        ),
    )


def body(schema: Schema, **examples: Example) -> RequestBody:
    """A body of JSON."""
    return RequestBody(
        required=True,
        content={"application/json": OpenAPIMediaType(schema=schema, examples=dict(examples))},
    )
