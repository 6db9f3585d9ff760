"""The JSON of requests and answers, and how it is made from rows: what all of it shares.

Answers are msgspec structs: one page may hold a thousand items. A request's body and a provider's
reply are embedded as they were stored, to the letter: key order, numbers and escapes stay. What
strangers send is pydantic's to validate. Names are camelCase, states upper case, times RFC 3339 in
UTC with milliseconds. Each noun has a module of its own: wire_capacity, wire_tenants, wire_batches.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar, cast

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic import ValidationError as PydanticError
from pydantic.alias_generators import to_camel

from app.errors import Problem, ValidationError

Json = dict[str, object]

MASK = "********"

encode = msgspec.json.Encoder().encode


def instant(at: datetime) -> str:
    """A time as the wire shows it."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def instant_or_none(at: datetime | None) -> str | None:
    """The same for what may not have happened yet."""
    return None if at is None else instant(at)


# Answers ------------------------------------------------------------------------------------------


class Answer(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """What Sluice answers."""


# Requests -----------------------------------------------------------------------------------------


def _check(value: object) -> None:
    """Refuse what Postgres cannot keep in text: NUL, and halves of surrogate pairs."""
    match value:
        case str():
            if "\0" in value:
                raise ValueError("must not contain the character \\u0000")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("must not contain half of a surrogate pair") from None
        case dict():
            for key, each in cast("dict[object, object]", value).items():
                _check(key)
                _check(each)
        case list():
            for each in cast("list[object]", value):
                _check(each)
        case _:
            pass


def _storable(value: object) -> object:
    _check(value)
    return value


# Not pydantic's strict mode: Litestar's plugin calls it in a way that overrides a field's own.
def _whole(value: object) -> object:
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004 - pydantic wants ValueError
    return value


def moment(value: object) -> object:
    """A time with its zone, for pydantic; None stays."""
    if value is None or isinstance(value, datetime):
        return value
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError("must be a time with its zone, such as 2030-01-31T00:00:00Z")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time that a calendar has") from None


Text = Annotated[str, BeforeValidator(_storable)]
Name = Annotated[str, BeforeValidator(_storable), Field(min_length=1, max_length=200)]
Keyed = Annotated[dict[str, Any], BeforeValidator(_storable)]
Flag = Annotated[bool, BeforeValidator(_boolean)]
Whole = Annotated[int, BeforeValidator(_whole)]
Moment = Annotated[datetime | None, BeforeValidator(moment)]


class Sent(BaseModel):
    """What a client sends. Unknown keys are ignored, as the reference's clients expect."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=False, extra="ignore", strict=False
    )


Change = TypeVar("Change", bound=Sent)


def problems_of(error: PydanticError) -> list[Problem]:
    """What pydantic found, in our words and with the wire's paths."""
    found: list[Problem] = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        path = ""
        for part in each["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "missing":
            message = "is required"
        found.append(Problem(path=path or "body", message=message))
    return found


def object_of(body: bytes) -> Json:
    """A body that is a JSON object. Raises ValidationError."""
    try:
        given: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValidationError([Problem(path="body", message="must be a JSON object")])
    return cast("Json", given)


def read(model: type[Change], given: Json) -> Change:
    """What a request says. Raises ValidationError."""
    try:
        return model.model_validate(given)
    except PydanticError as error:
        raise ValidationError(problems_of(error)) from None


def changes(model: type[Change], given: Json) -> Change:
    """What a change says. Raises ValidationError, also when it says nothing that is known."""
    wanted = read(model, given)
    if not wanted.model_fields_set:
        *most, last = (field.alias or name for name, field in model.model_fields.items())
        raise ValidationError(
            [
                Problem(
                    path="body",
                    message=f"changes nothing; send some of {', '.join(most)} and {last}",
                )
            ]
        )
    return wanted
