"""Descriptions, for OpenAPI, of the bodies of OpenAI's routes, which are read by hand."""

from dataclasses import dataclass

from litestar.openapi.spec import Example, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIType

from app import inputs
from app.api import described


def _asked() -> dict[str, Schema]:
    return {
        "input_file_id": described.text,
        "endpoint": Schema(type=OpenAPIType.STRING, enum=list(inputs.NEEDS)),
        "completion_window": Schema(
            type=OpenAPIType.STRING, description="from 1m to 90d, such as 30m, 24h or 7d"
        ),
        "priority": described.whole(-100, 100),
        "weight": Schema(type=OpenAPIType.NUMBER, minimum=0.1, maximum=100),
    }


def _bounds() -> dict[str, Schema]:
    return {
        "max_tokens": Schema(
            type=OpenAPIType.INTEGER,
            minimum=1,
            description="the batch pauses when so many are used",
        ),
        "max_cost": Schema(
            type=OpenAPIType.NUMBER,
            exclusive_minimum=0,
            description="the batch pauses when so much is spent, in the currency of the prices",
        ),
    }


@dataclass
class CreateOperation(Operation):
    """A new batch."""

    def __post_init__(self) -> None:
        expiry = described.fields(
            ["anchor", "seconds"],
            anchor=Schema(type=OpenAPIType.STRING, enum=["created_at"]),
            seconds=described.whole(3600, 2_592_000),
        )
        self.request_body = described.body(
            described.fields(
                ["input_file_id", "endpoint", "completion_window"],
                metadata=described.record,
                output_expires_after=expiry,
                name=described.text,
                **_asked(),
                **_bounds(),
            ),
            day=Example(
                summary="Within a day",
                value={
                    "input_file_id": "file-0199d3f27c1e7a52b6a13f4f0c3a9d11",
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                },
            ),
        )


@dataclass
class ChangeOperation(Operation):
    """What steers a batch."""

    def __post_init__(self) -> None:
        asked = _asked()
        steering = {name: asked[name] for name in ("completion_window", "priority", "weight")}
        self.request_body = described.body(
            described.fields([], **steering, **_bounds()),
            raised=Example(summary="Let it spend more", value={"max_cost": 25}),
        )


@dataclass
class EstimateOperation(Operation):
    """A batch that is not made."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields(["input_file_id", "endpoint"], **_asked())
        )


@dataclass
class RetryOperation(Operation):
    """What a batch gets for its next try."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields([], completion_window=_asked()["completion_window"])
        )
        self.request_body.required = False
