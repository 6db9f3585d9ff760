"""Descriptions, for OpenAPI, of bodies that handlers read by hand."""

from collections.abc import Sequence
from functools import partial

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example, OpenAPIMediaType, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType

#: Documentation of an answer; made-up examples would be noise.
Answer = partial(ResponseSpec, generate_examples=False)

text = Schema(type=OpenAPIType.STRING)
texts = Schema(type=OpenAPIType.ARRAY, items=text)
flag = Schema(type=OpenAPIType.BOOLEAN)
moment = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.DATE_TIME)
window = Schema(type=OpenAPIType.STRING, description="from 1m to 90d, such as 30m, 24h or 7d")
record = Schema(type=OpenAPIType.OBJECT)


def whole(least: int, most: int) -> Schema:
    """A whole number."""
    return Schema(type=OpenAPIType.INTEGER, minimum=least, maximum=most)


def words(*known: str) -> Schema:
    """One of these words."""
    return Schema(type=OpenAPIType.STRING, enum=list(known))


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


def body(schema: Schema, **examples: Example) -> RequestBody:
    """A body of JSON."""
    return RequestBody(
        required=True,
        content={"application/json": OpenAPIMediaType(schema=schema, examples=dict(examples))},
    )


def optional_body(schema: Schema, **examples: Example) -> RequestBody:
    """A body of JSON that may be absent."""
    described = body(schema, **examples)
    described.required = False
    return described
