"""Routing rules: which model an item of a resource is asked of, decided as the item is created.

A resource has rules in order. Each has conditions (comparisons, and groups of them with AND or OR) and an
action: ``CALL_MODEL`` sends the item to another model, for a share of the ``traffic`` if it says one;
``BLOCK`` refuses it. The first rule whose conditions hold and whose die falls decides; without one the
item goes to the resource's own model. The die is drawn from the item's batch and number, so the same
item always falls the same way.

Rules are data. An expression is one of the names below and nothing else; nothing is evaluated, and
there are no regular expressions, whose cost a stranger could choose.

tokens.input                  the estimated tokens of the prompt
request.model                 the model that the request names, which is otherwise not used
request.toolsCount            how many tools it offers
request.messagesCount         how many messages it has
request.lastMessage.role      of its last message
request.lastMessage.content   its text
request.allMessagesContent    the text of all messages, one per line
metadata.NAME                 a field of the batch's metadata, or of the request's own ``vmx.metadata``
errorRate(MINUTES)            per cent of the resource's calls of the last 1 to 1440 minutes that failed
capacityUsage(PERIOD)         per cent in use of its tightest limit of that period

A comparison with what is not there is false, but for NOT_EQUAL, NOT_CONTAINS, NOT_IN and NOT_EXISTS.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, cast
from uuid import UUID

from app.errors import Problem

Json = Mapping[str, object]
Scalar = str | float | bool | None

MOST_RULES: Final = 50
MOST_CONDITIONS: Final = 200
MOST_DEPTH: Final = 8
MOST_TEXT: Final = 2000
MOST_MINUTES: Final = 1440

PERIODS: Final = ("minute", "hour", "day", "week", "month", "lifetime")

Comparator = Literal[
    "EQUAL",
    "NOT_EQUAL",
    "GREATER_THAN",
    "GREATER_THAN_OR_EQUAL",
    "LESS_THAN",
    "LESS_THAN_OR_EQUAL",
    "CONTAINS",
    "NOT_CONTAINS",
    "STARTS_WITH",
    "ENDS_WITH",
    "IN",
    "NOT_IN",
    "EXISTS",
    "NOT_EXISTS",
]
_ALIASES: Final[Mapping[str, Comparator]] = {
    "EQUAL": "EQUAL",
    "NOT_EQUAL": "NOT_EQUAL",
    "GT": "GREATER_THAN",
    "GREATER_THAN": "GREATER_THAN",
    "GTE": "GREATER_THAN_OR_EQUAL",
    "GREATER_THAN_OR_EQUAL": "GREATER_THAN_OR_EQUAL",
    "LT": "LESS_THAN",
    "LESS_THAN": "LESS_THAN",
    "LTE": "LESS_THAN_OR_EQUAL",
    "LESS_THAN_OR_EQUAL": "LESS_THAN_OR_EQUAL",
    "CONTAINS": "CONTAINS",
    "NOT_CONTAINS": "NOT_CONTAINS",
    "STARTS_WITH": "STARTS_WITH",
    "ENDS_WITH": "ENDS_WITH",
    "IN": "IN",
    "NOT_IN": "NOT_IN",
    "EXISTS": "EXISTS",
    "NOT_EXISTS": "NOT_EXISTS",
}
_ORDERING: Final = {
    "GREATER_THAN",
    "GREATER_THAN_OR_EQUAL",
    "LESS_THAN",
    "LESS_THAN_OR_EQUAL",
}
_TEXTUAL: Final = {"CONTAINS", "NOT_CONTAINS", "STARTS_WITH", "ENDS_WITH"}
_LISTED: Final = {"IN", "NOT_IN"}
_PRESENCE: Final = {"EXISTS", "NOT_EXISTS"}
_TRUE_WHEN_ABSENT: Final = {"NOT_EQUAL", "NOT_CONTAINS", "NOT_IN", "NOT_EXISTS"}

_NUMBERS: Final = {"tokens.input", "request.toolsCount", "request.messagesCount"}
_TEXTS: Final = {
    "request.model",
    "request.lastMessage.role",
    "request.lastMessage.content",
    "request.allMessagesContent",
}
_METADATA: Final = re.compile(r"metadata\.[^\x00-\x1f]{1,200}")
_ERROR_RATE: Final = re.compile(r"errorRate\(\s*([0-9]{1,4})\s*\)")
_CAPACITY_USAGE: Final = re.compile(r"capacityUsage\(\s*['\"]?([A-Za-z]+)['\"]?\s*\)")


# What rules are -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One comparison. ``values``: what it compares with; several for IN, none for EXISTS."""

    expression: str
    comparator: Comparator
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Several conditions of which all (AND) or one (OR) must hold."""

    operator: Literal["AND", "OR"]
    conditions: "tuple[Comparison | Group, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The model that a rule sends to."""

    model: str
    connection_id: UUID
    provider: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """``target`` None: what matches is refused. ``traffic``: per cent of the matches that it takes."""

    number: int
    when: Group
    target: Target | None
    traffic: float
    description: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules of a resource that are switched on, in order."""

    rules: tuple[Rule, ...]

    @property
    def targets(self) -> list[Target]:
        """The models that they send to, in order."""
        return [rule.target for rule in self.rules if rule.target is not None]

    @property
    def expressions(self) -> set[str]:
        """Everything that they look at."""
        found: set[str] = set()
        pending: list[Comparison | Group] = [rule.when for rule in self.rules]
        while pending:
            match pending.pop():
                case Group(conditions=conditions):
                    pending += conditions
                case Comparison(expression=expression):
                    found.add(expression)
        return found

    @property
    def error_minutes(self) -> set[int]:
        """The windows whose error rates they look at."""
        found = (_ERROR_RATE.fullmatch(each) for each in self.expressions)
        return {int(each[1]) for each in found if each}

    @property
    def looks_at_capacity(self) -> bool:
        """Whether they look at the use of limits."""
        return any(each.startswith("capacityUsage") for each in self.expressions)


# Reading them -------------------------------------------------------------------------------------


def parse(wire: Json | None) -> tuple[Rules, list[Problem]]:
    """The rules that a resource's ``routing`` says, and what is wrong with it, by path.

    Rules that are switched off are checked too, but left out.
    """
    reader = _Reader()
    if wire is None:
        return Rules(rules=()), []
    enabled = reader.flag(wire, "enabled", "routing")
    rules: list[Rule] = []
    given = wire.get("conditions")
    if given is None:
        given = []
    if not isinstance(given, list):
        reader.wrong("routing.conditions", "must be an array of rules")
        given = []
    listed = cast("list[object]", given)
    if len(listed) > MOST_RULES:
        reader.wrong("routing.conditions", f"has more than {MOST_RULES} rules")
    for number, each in enumerate(listed[:MOST_RULES]):
        path = f"routing.conditions[{number}]"
        if not isinstance(each, dict):
            reader.wrong(path, "must be an object")
            continue
        rule = reader.rule(cast("Json", each), number, path)
        if rule is not None and reader.flag(cast("Json", each), "enabled", path):
            rules.append(rule)
    return Rules(rules=tuple(rules) if enabled else ()), reader.problems


class _Reader:
    """Reads rules and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._conditions = 0

    def wrong(self, path: str, message: str) -> None:
        self.problems.append(Problem(path=path, message=message))

    def flag(self, wire: Json, name: str, path: str) -> bool:
        value = wire.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(f"{path}.{name}", "must be true or false")
        return value is not False

    def rule(self, wire: Json, number: int, path: str) -> Rule | None:
        before = len(self.problems)
        for name in wire.keys() - {
            *("id", "description", "enabled", "mode", "operator", "if", "action", "then"),
        }:
            self.wrong(f"{path}.{name}", "is not known; a rule has if, operator, action and then")
        if wire.get("mode") not in (None, "UI"):
            self.wrong(f"{path}.mode", "must be UI: expressions in code are not evaluated")
        action = wire.get("action", "CALL_MODEL")
        if action not in ("CALL_MODEL", "BLOCK"):
            self.wrong(f"{path}.action", "must be CALL_MODEL or BLOCK")
        when = self.group(
            {"operator": wire.get("operator"), "conditions": wire.get("if")}, path, 0, "if"
        )
        target, traffic = None, 100.0
        if action == "CALL_MODEL":
            target, traffic = self.then(wire.get("then"), f"{path}.then")
        description = wire.get("description")
        if description is not None and not isinstance(description, str):
            self.wrong(f"{path}.description", "must be text")
        if len(self.problems) > before:
            return None
        return Rule(
            number=number,
            when=when,
            target=target,
            traffic=traffic,
            description=description if isinstance(description, str) else None,
        )

    def then(self, given: object, path: str) -> tuple[Target | None, float]:
        if not isinstance(given, dict):
            self.wrong(path, "is required: the model to call")
            return None, 0.0
        wire = cast("Json", given)
        model, provider = wire.get("model"), wire.get("provider")
        if not isinstance(model, str) or not 0 < len(model) <= 200:  # noqa: PLR2004 - as of names
            self.wrong(f"{path}.model", "must be text of 1 to 200 characters")
        if provider is not None and not isinstance(provider, str):
            self.wrong(f"{path}.provider", "must be text")
        connection_id: UUID | None = None
        try:
            connection_id = UUID(str(wire.get("connectionId")))
        except ValueError:
            self.wrong(f"{path}.connectionId", "must be the id of a connection")
        traffic = wire.get("traffic")
        if traffic is None:
            traffic = 100
        if (
            not isinstance(traffic, int | float)
            or isinstance(traffic, bool)
            or not 0 < traffic <= 100  # noqa: PLR2004 - per cent
        ):
            self.wrong(f"{path}.traffic", "must be a number above 0, at most 100 (per cent)")
            return None, 0.0
        if connection_id is None or not isinstance(model, str):
            return None, 0.0
        return (
            Target(
                model=model,
                connection_id=connection_id,
                provider=provider if isinstance(provider, str) else None,
            ),
            float(traffic),
        )

    def group(self, wire: Json, path: str, depth: int, name: str = "conditions") -> Group:
        operator = wire.get("operator")
        if operator is None:
            operator = "AND"
        if operator not in ("AND", "OR"):
            self.wrong(f"{path}.operator", "must be AND or OR")
        given = wire.get("conditions")
        found: list[Comparison | Group] = []
        if not isinstance(given, list) or not given:
            self.wrong(f"{path}.{name}", "must be an array with at least one condition")
        elif depth > MOST_DEPTH:
            self.wrong(f"{path}.{name}", f"is nested more than {MOST_DEPTH} deep")
        else:
            for number, each in enumerate(cast("list[object]", given)):
                inner = self.condition(each, f"{path}.{name}[{number}]", depth)
                if inner is not None:
                    found.append(inner)
        return Group(operator="OR" if operator == "OR" else "AND", conditions=tuple(found))

    def condition(self, given: object, path: str, depth: int) -> Comparison | Group | None:
        self._conditions += 1
        if self._conditions > MOST_CONDITIONS:
            if self._conditions == MOST_CONDITIONS + 1:
                self.wrong(path, f"there are more than {MOST_CONDITIONS} conditions")
            return None
        if not isinstance(given, dict):
            self.wrong(path, "must be an object")
            return None
        wire = cast("Json", given)
        if "conditions" in wire:
            return self.group(wire, path, depth + 1)
        return self.comparison(wire, path)

    def comparison(self, wire: Json, path: str) -> Comparison | None:
        before = len(self.problems)
        for name in wire.keys() - {"id", "type", "expression", "comparator", "value"}:
            self.wrong(f"{path}.{name}", "is not known; it has expression, comparator and value")
        expression = _canonical(wire.get("expression"))
        if expression is None:
            self.wrong(
                f"{path}.expression",
                f"must be one of {', '.join(sorted(_NUMBERS | _TEXTS))}, metadata.NAME, "
                f"errorRate(1 to {MOST_MINUTES} minutes) and capacityUsage({'|'.join(PERIODS)})",
            )
        comparator = _ALIASES.get(str(wire.get("comparator")))
        if comparator is None:
            known = dict.fromkeys(_ALIASES.values())
            self.wrong(f"{path}.comparator", f"must be one of {', '.join(known)}")
        if expression is None or comparator is None:
            return None
        values = self.values(wire, expression, comparator, f"{path}.value")
        if len(self.problems) > before:
            return None
        return Comparison(expression=expression, comparator=comparator, values=values)

    def values(
        self, wire: Json, expression: str, comparator: Comparator, path: str
    ) -> tuple[Scalar, ...]:
        if comparator in _PRESENCE:
            return ()
        if "value" not in wire:
            self.wrong(path, "is required")
            return ()
        given = wire["value"]
        if comparator in _LISTED:
            if not isinstance(given, list) or not given:
                self.wrong(path, "must be an array with at least one value")
                return ()
            listed = cast("list[object]", given)
        else:
            listed = [given]
        if comparator in _TEXTUAL and _is_number(expression):
            self.wrong(path, "compares text, and this is a number")
        elif comparator in _ORDERING and expression in _TEXTS:
            self.wrong(path, "compares numbers, and this is text")
        for each in listed:
            message = _wrong_value(each, expression, comparator)
            if message is not None:
                self.wrong(path, message)
        return tuple(cast("list[Scalar]", listed))


def _wrong_value(value: object, expression: str, comparator: Comparator) -> str | None:
    """What is wrong with a value that an expression is compared with; None: nothing."""
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"is longer than {MOST_TEXT} characters"
    if comparator in _TEXTUAL or expression in _TEXTS:
        return None if isinstance(value, str) else "must be text"
    if comparator in _ORDERING or _is_number(expression):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number else "must be a number"
    return None if isinstance(value, str | int | float) else "must be text, a number, true or false"


def _canonical(expression: object) -> str | None:
    """An expression as we write it; None: there is no such thing."""
    if not isinstance(expression, str):
        return None
    if expression in _NUMBERS or expression in _TEXTS or _METADATA.fullmatch(expression):
        return expression
    if (found := _ERROR_RATE.fullmatch(expression)) and 1 <= int(found[1]) <= MOST_MINUTES:
        return f"errorRate({int(found[1])})"
    if (found := _CAPACITY_USAGE.fullmatch(expression)) and found[1].lower() in PERIODS:
        return f"capacityUsage({found[1].lower()})"
    return None


def _is_number(expression: str) -> bool:
    return expression in _NUMBERS or expression.startswith(("errorRate(", "capacityUsage("))


# Deciding -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all items of a batch have in common, read once: per cents by expression."""

    metadata: Json = field(default_factory=dict[str, object])
    percents: Mapping[str, float] = field(default_factory=dict[str, float])


class Facts:
    """What rules may look at of one item; worked out when it is looked at."""

    def __init__(self, request: Json, *, input_tokens: int, around: Surroundings) -> None:
        self._request = request
        self._input_tokens = input_tokens
        self._around = around

    def of(self, expression: str) -> Scalar:
        """The value of an expression; None: it is not there."""
        known = _KNOWN.get(expression)
        if known is not None:
            return known(self)
        if expression.startswith("metadata."):
            return self._metadata(expression.removeprefix("metadata."))
        return self._around.percents.get(expression)

    def _metadata(self, name: str) -> Scalar:
        own: object = None
        vmx = self._request.get("vmx")
        if isinstance(vmx, dict):
            own = cast("Json", vmx).get("metadata")
        for place in (own, self._around.metadata):
            if isinstance(place, Mapping):
                value = cast("Json", place).get(name)
                if isinstance(value, str | int | float | bool):
                    return value
        return None

    @cached_property
    def _messages(self) -> list[Json]:
        given = self._request.get("messages")
        if not isinstance(given, list):
            return []
        found = cast("list[object]", given)
        return [cast("Json", each) for each in found if isinstance(each, dict)]

    @property
    def input_tokens(self) -> Scalar:
        return self._input_tokens

    @property
    def model(self) -> Scalar:
        model = self._request.get("model")
        return model if isinstance(model, str) else None

    @property
    def tools(self) -> Scalar:
        tools = self._request.get("tools")
        return len(cast("list[object]", tools)) if isinstance(tools, list) else 0

    @property
    def messages(self) -> Scalar:
        return len(self._messages)

    @property
    def last_role(self) -> Scalar:
        role = self._messages[-1].get("role") if self._messages else None
        return role if isinstance(role, str) else None

    @property
    def last_text(self) -> Scalar:
        return _text(self._messages[-1].get("content")) if self._messages else None

    @cached_property
    def all_text(self) -> Scalar:
        return "\n".join(_text(message.get("content")) for message in self._messages)


_KNOWN: Final[Mapping[str, Callable[[Facts], Scalar]]] = {
    "tokens.input": lambda facts: facts.input_tokens,
    "request.model": lambda facts: facts.model,
    "request.toolsCount": lambda facts: facts.tools,
    "request.messagesCount": lambda facts: facts.messages,
    "request.lastMessage.role": lambda facts: facts.last_role,
    "request.lastMessage.content": lambda facts: facts.last_text,
    "request.allMessagesContent": lambda facts: facts.all_text,
}


def _text(content: object) -> str:
    """The text of a message's content: a string, or its text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [cast("Json", p) for p in cast("list[object]", content) if isinstance(p, dict)]
    texts = [part.get("text") for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def decide(rules: Rules, facts: Facts, *, batch_id: UUID, seq: int) -> Rule | None:
    """The rule that takes an item; None: none does, and it goes to the resource's own model."""
    for rule in rules.rules:
        if _holds(rule.when, facts) and (
            rule.target is None or _die(batch_id, seq, rule.number) < rule.traffic
        ):
            return rule
    return None


def _die(batch_id: UUID, seq: int, rule: int) -> float:
    """0 to below 100, the same whenever it is thrown for an item and a rule."""
    drawn = hashlib.blake2b(f"{batch_id}/{seq}/{rule}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) / 2**64 * 100


def _holds(condition: Comparison | Group, facts: Facts) -> bool:
    match condition:
        case Group(operator="AND", conditions=conditions):
            return all(_holds(each, facts) for each in conditions)
        case Group(conditions=conditions):
            return any(_holds(each, facts) for each in conditions)
        case Comparison():
            return _compare(facts.of(condition.expression), condition.comparator, condition.values)


def _compare(value: Scalar, comparator: Comparator, values: Sequence[Scalar]) -> bool:  # noqa: PLR0911 - one line per comparator
    if value is None:
        return comparator in _TRUE_WHEN_ABSENT
    if comparator in _PRESENCE:
        return comparator == "EXISTS"
    match comparator:
        case "EQUAL" | "IN":
            return any(_same(value, each) for each in values)
        case "NOT_EQUAL" | "NOT_IN":
            return not any(_same(value, each) for each in values)
        case "CONTAINS":
            return str(values[0]) in str(value)
        case "NOT_CONTAINS":
            return str(values[0]) not in str(value)
        case "STARTS_WITH":
            return str(value).startswith(str(values[0]))
        case "ENDS_WITH":
            return str(value).endswith(str(values[0]))
        case _:
            return _ordered(_number(value), comparator, _number(values[0]))


def _same(one: Scalar, other: Scalar) -> bool:
    """Whether two values are equal; a number and the text of it are, as metadata is often text."""
    if isinstance(one, bool) or isinstance(other, bool):
        return str(one).lower() == str(other).lower()
    if isinstance(one, str) and isinstance(other, str):
        return one == other
    left, right = _number(one), _number(other)
    return left is not None and left == right


def _number(value: Scalar) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _ordered(value: float | None, comparator: Comparator, other: float | None) -> bool:
    if value is None or other is None:
        return False
    match comparator:
        case "GREATER_THAN":
            return value > other
        case "GREATER_THAN_OR_EQUAL":
            return value >= other
        case "LESS_THAN":
            return value < other
        case _:
            return value <= other


def without(wire: Json, connection_id: UUID) -> dict[str, object]:
    """The same rules but for those that call a model on a connection, which is being deleted."""
    kept: list[Json] = []
    for rule in cast("list[Json]", wire.get("conditions") or []):
        then = cast("Json", rule.get("then") or {})
        if str(then.get("connectionId")).lower() != str(connection_id):
            kept.append(rule)
    return {**wire, "conditions": kept}
