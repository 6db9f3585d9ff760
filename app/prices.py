"""Prices of models: read from a file, stored, and asked for by whoever bounds what a batch may cost.

What an attempt cost is computed by settle (sql/functions/settle.sql) and kept, so that a price that comes
later changes no history. Money is counted in billionths of its currency.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Final, cast
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.errors import InputError, Problem, ValidationError
from app.ids import uuid7

#: Billionths in one of a currency.
NANO: Final = 10**9

_FIELDS: Final[Mapping[str, str]] = {
    "model": "model",
    "input": "input",
    "input_per_million": "input",
    "inputpermillion": "input",
    "cached": "cached",
    "cached_input": "cached",
    "cached_per_million": "cached",
    "cachedpermillion": "cached",
    "output": "output",
    "output_per_million": "output",
    "outputpermillion": "output",
    "currency": "currency",
    "valid_from": "valid_from",
    "validfrom": "valid_from",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a million tokens cost. ``model``: a name in which ``*`` stands for any characters.

    ``cached_per_million`` None: cached input costs as other input. ``valid_from`` None: from now on.
    """

    model: str
    input_per_million: Decimal
    cached_per_million: Decimal | None
    output_per_million: Decimal
    currency: str
    valid_from: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrice:
    """A price as it is kept. ``workspace_id`` None: it is everyone's."""

    workspace_id: UUID | None
    model: str
    input_per_million: Decimal
    cached_per_million: Decimal | None
    output_per_million: Decimal
    currency: str
    valid_from: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Money: billionths of a currency."""

    nano: int
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What calls would cost now. ``cost`` is None unless all are paid for in one currency.

    ``unpriced``: the models whose price is not known.
    """

    cost: Cost | None
    unpriced: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paid:
    resource_id: UUID
    resource: str
    model: str
    currency: str | None
    input_nano: Decimal | None
    output_nano: Decimal | None


_price_put = Query("prices", "price_put", NoRow)
_prices_list = Query("prices", "prices_list", StoredPrice)
_prices_of_resources = Query("prices", "prices_of_resources", _Paid)


def parse(text: str) -> list[Price]:
    """The prices of a CSV file with a header, or of a JSON array of objects.

    Fields: model, input, output (per million tokens), and optionally cached, currency (USD), valid_from.
    Raises InputError with the place and what is wrong there.
    """
    if text.lstrip().startswith(("[", "{")):
        try:
            found: object = json.loads(text, parse_float=Decimal)
        except ValueError as error:
            raise InputError(f"The file is not valid JSON: {error}.") from None
        rows = found
        if isinstance(found, dict):
            named = cast("dict[str, object]", found)
            rows = named.get("prices", [named])
        if not isinstance(rows, list):
            raise InputError("The file must hold an array of prices.")
        return [
            _price(row, f"Price {n}") for n, row in enumerate(cast("list[object]", rows), start=1)
        ]
    lines = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    return [_price(dict(row), f"Line {lines.line_num}") for row in lines]


def _price(row: object, place: str) -> Price:
    if not isinstance(row, dict):
        raise InputError(f"{place} is not an object with model, input and output.")
    given: dict[str, object] = {}
    for name, value in cast("dict[object, object]", row).items():
        known = _FIELDS.get(str(name).strip().lower())
        if known is None:
            raise InputError(
                f"{place} has '{name}', which is no field of a price; there is: model, input,"
                " cached, output, currency, valid_from."
            )
        if value is not None and str(value).strip() != "":
            given[known] = str(value).strip()
    for name in ("model", "input", "output"):
        if name not in given:
            raise InputError(f"{place} has no {name}.")
    currency = str(given.get("currency", "USD")).upper()
    if len(currency) != 3 or not currency.isascii() or not currency.isalpha():  # noqa: PLR2004 - ISO 4217
        raise InputError(f"{place}: '{currency}' is no currency; write it like USD.")
    return Price(
        model=str(given["model"]),
        input_per_million=_amount(given["input"], place, "input"),
        cached_per_million=_amount(given["cached"], place, "cached") if "cached" in given else None,
        output_per_million=_amount(given["output"], place, "output"),
        currency=currency,
        valid_from=_moment(given["valid_from"], place) if "valid_from" in given else None,
    )


def _amount(value: object, place: str, name: str) -> Decimal:
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or not 0 <= amount < 10**9:
        raise InputError(f"{place}: {name} '{value}' is no price of a million tokens.")
    return amount


def _moment(value: object, place: str) -> datetime:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise InputError(
            f"{place}: valid_from '{value}' is no date; write it like 2026-01-31."
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


async def put(conn: Connection, prices: Sequence[Price], *, workspace_id: UUID | None) -> None:
    """Store prices, of one workspace or of all."""
    for price in prices:
        await _price_put.run(
            conn,
            price_id=uuid7(),
            workspace_id=workspace_id,
            model=price.model,
            input_per_million=price.input_per_million,
            cached_per_million=price.cached_per_million,
            output_per_million=price.output_per_million,
            currency=price.currency,
            valid_from=price.valid_from,
        )


async def known(conn: Connection, *, workspace_id: UUID | None = None) -> list[StoredPrice]:
    """All prices, or those that concern a workspace."""
    return await _prices_list.all(conn, workspace_id=workspace_id)


async def currency_of(conn: Connection, *, workspace_id: UUID, resource_ids: Sequence[UUID]) -> str:
    """The one currency in which all of these resources are paid for.

    Raises ValidationError of ``maxCost`` when there is none: what cannot be priced cannot be bounded.
    """
    found = await _prices_of_resources.all(
        conn, workspace_id=workspace_id, resource_ids=list(resource_ids)
    )
    unknown = [f"{each.model} (resource '{each.resource}')" for each in found if not each.currency]
    if unknown:
        raise ValidationError(
            [
                Problem(
                    path="maxCost",
                    message=f"needs the price of {', '.join(unknown)}; import one with"
                    " `sluice prices import FILE`, or bound the tokens instead",
                )
            ]
        )
    currencies = sorted({each.currency for each in found if each.currency})
    if len(currencies) != 1:
        raise ValidationError(
            [
                Problem(
                    path="maxCost",
                    message="needs resources that are paid for in one currency, not in "
                    + " and ".join(currencies),
                )
            ]
        )
    return currencies[0]


async def expected(
    conn: Connection, *, workspace_id: UUID, tokens: Mapping[UUID, tuple[int, float]]
) -> Expected:
    """What tokens would cost now: input and output tokens by resource, none of them cached."""
    found = await _prices_of_resources.all(
        conn, workspace_id=workspace_id, resource_ids=list(tokens)
    )
    nano = Decimal(0)
    currencies: set[str] = set()
    unpriced: set[str] = set()
    for each in found:
        if each.currency is None or each.input_nano is None or each.output_nano is None:
            unpriced.add(each.model)
            continue
        input_tokens, output_tokens = tokens[each.resource_id]
        nano += input_tokens * each.input_nano + Decimal(output_tokens) * each.output_nano
        currencies.add(each.currency)
    if unpriced or len(currencies) != 1:
        return Expected(cost=None, unpriced=sorted(unpriced))
    return Expected(cost=Cost(nano=round(nano), currency=currencies.pop()))
