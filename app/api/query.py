"""Query parameters, which come as text and are read by ourselves.

A framework's idea of a boolean takes garbage for one, and the reference's takes it for false; here
garbage is a 400 that names the parameter.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, TypeVar, cast
from uuid import UUID

from litestar.params import PathParameter, QueryParameter

from app.batches import BatchType, Status
from app.errors import Problem, ValidationError
from app.intake import MOST_ITEMS

BatchId = Annotated[UUID, PathParameter(name="batchId")]
ItemId = Annotated[UUID, PathParameter(name="itemId")]
Switch = Annotated[str | None, QueryParameter(description="true or false")]
Limit = Annotated[str | None, QueryParameter(description="1 to 1000; default 100")]
Cursor = Annotated[str | None, QueryParameter(description="nextCursor of the page before")]
ItemStates = Annotated[
    str | None,
    QueryParameter(description="only items in this state, or in these: FAILED,CANCELLED"),
]
ErrorCodes = Annotated[
    str | None,
    QueryParameter(
        name="errorCode", description="only failed items with this error, or with these"
    ),
]
ResponseFormat = Annotated[
    str | None,
    QueryParameter(
        name="responseFormat", description="openai: the provider's reply alone as the response"
    ),
]

_BOOLEANS: Final = {"true": True, "false": False}
_STATUSES: Final = ("pending", "running", "completed", "failed", "cancelled")
_TYPES: Final = ("sync", "async", "callback")
_MOST_CODES: Final = 100
_MOST_TEXT: Final = 512

Order = Literal["asc", "desc"]
Word = TypeVar("Word", bound=str)


def refuse(name: str, message: str) -> ValidationError:
    """What is wrong with one parameter."""
    return ValidationError([Problem(path=name, message=message)])


def switch(value: str | None, name: str, *, default: bool) -> bool:
    """A boolean of the query, in any letter case."""
    if value is None:
        return default
    known = _BOOLEANS.get(value.lower())
    if known is None:
        raise refuse(name, "must be true or false")
    return known


def number(value: str | None, name: str, *, default: int, least: int, most: int) -> int:
    """A whole number of the query."""
    if value is None:
        return default
    digits = value.removeprefix("-") if least < 0 else value
    whole = digits.isascii() and digits.isdecimal() and len(digits) <= 18  # noqa: PLR2004 - fits bigint
    if not whole or not least <= int(value) <= most:
        raise refuse(name, f"must be a whole number from {least} to {most}")
    return int(value)


def seq(value: str | None, name: str) -> int | None:
    """The number of an item, as a cursor has it."""
    return None if value is None else number(value, name, default=0, least=0, most=MOST_ITEMS)


def uuid(value: str | None, name: str, message: str = "must be a UUID") -> UUID | None:
    """An id."""
    try:
        return None if value is None else UUID(value)
    except ValueError:
        raise refuse(name, message) from None


def text(value: str | None, name: str) -> str | None:
    """Some words, such as Postgres can hold."""
    if value is None:
        return None
    if not 0 < len(value) <= _MOST_TEXT or "\0" in value or not value.isprintable():
        raise refuse(name, f"must have 1 to {_MOST_TEXT} printable characters")
    return value


def one_of(value: str | None, name: str, known: Sequence[Word]) -> Word | None:
    """One of some words, in any letter case."""
    if value is None:
        return None
    if value.lower() not in known:
        raise refuse(name, f"must be {_either(known)}")
    return cast("Word", value.lower())


def some_of(value: str | None, name: str, known: Sequence[Word]) -> list[Word]:
    """Some of these words, separated by commas, in any letter case."""
    if value is None:
        return []
    given = [part.strip().lower() for part in value.split(",")]
    if any(part not in known for part in given):
        raise refuse(name, f"must be {_either([k.upper() for k in known])}, or some of them")
    return cast("list[Word]", given)


def statuses(value: str | None, name: str) -> list[Status]:
    """States of batches or items."""
    return some_of(value, name, _STATUSES)


def types(value: str | None, name: str) -> list[BatchType]:
    """Types of batches."""
    return some_of(value, name, _TYPES)


def codes(value: str | None, name: str) -> list[str]:
    """Error codes, separated by commas."""
    if value is None:
        return []
    given = [part.strip() for part in value.split(",")]
    if len(given) > _MOST_CODES:
        raise refuse(name, f"must be at most {_MOST_CODES} error codes, separated by commas")
    for part in given:
        text(part, name)
    return given


def moment(value: str | None, name: str) -> datetime | None:
    """A time with its zone. A + that was not escaped came as a space."""
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value.replace(" ", "+") if "T" in value else value)
        if at.tzinfo is not None:
            return at.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise refuse(name, "must be a time with its zone, such as 2030-01-31T00:00:00Z")


def pairs(values: Sequence[str] | None, name: str) -> dict[str, str]:
    """What was given as ``key=value``, once or several times."""
    found: dict[str, str] = {}
    for given in values or ():
        key, equals, value = given.partition("=")
        if not key or not equals or "\0" in given:
            raise refuse(name, "must be key=value, such as metadata=team=search")
        found[key] = value
    return found


def is_bare(response_format: str | None) -> bool:
    """Whether the provider's reply alone is wanted as an item's response."""
    return one_of(response_format, "responseFormat", ("sluice", "openai")) == "openai"


def _either(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
