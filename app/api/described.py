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


def several(items: Schema) -> Schema:
    """An array."""
    return Schema(type=OpenAPIType.ARRAY, items=items)


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


def body(schema: Schema, **examples: Example) -> RequestBody:
    """A body of JSON."""
    return RequestBody(
        required=True,
        content={"application/json": OpenAPIMediaType(schema=schema, examples=dict(examples))},
    )
