"""Routing rules: what they say, what they may not say, and which one takes an item."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from app.ids import uuid7
from app.routing import Facts, Rules, Surroundings, decide, parse, without

Json = dict[str, Any]

WHERE = "0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d11"
THEN = {"model": "large", "connectionId": WHERE}
REQUEST: Json = {
    "model": "asked",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Where is my card?"}, {"type": "x"}]},
    ],
    "tools": [{}, {}],
    "vmx": {"metadata": {"team": "red"}},
}
AROUND = Surroundings(
    metadata={"team": "blue", "tier": 3, "vip": True},
    percents={"errorRate(5)": 12.5, "capacityUsage(minute)": 80.0},
)


def facts(request: Json | None = None, *, tokens: int = 100) -> Facts:
    return Facts(REQUEST if request is None else request, input_tokens=tokens, around=AROUND)


def rules(*conditions: Json, **more: Any) -> Rules:  # noqa: ANN401 - JSON
    found, problems = parse({"conditions": [{"if": list(conditions), "then": THEN, **more}]})
    assert problems == []
    return found


def takes(*conditions: Json, request: Json | None = None, **more: Any) -> bool:  # noqa: ANN401 - JSON
    rule = decide(rules(*conditions, **more), facts(request), batch_id=uuid7(), seq=0)
    return rule is not None


def is_so(expression: str, comparator: str, value: object = None) -> Json:
    return {"expression": expression, "comparator": comparator, "value": value}


HOLDS: list[tuple[str, str, object]] = [
    ("tokens.input", "EQUAL", 100),
    ("tokens.input", "NOT_EQUAL", 99),
    ("tokens.input", "GT", 99),
    ("tokens.input", "GTE", 100),
    ("tokens.input", "LT", 100.5),
    ("tokens.input", "LTE", 100),
    ("tokens.input", "IN", [1, 100]),
    ("request.toolsCount", "EQUAL", 2),
    ("request.messagesCount", "GREATER_THAN", 1),
    ("request.model", "STARTS_WITH", "as"),
    ("request.model", "ENDS_WITH", "ked"),
    ("request.model", "NOT_IN", ["other"]),
    ("request.lastMessage.role", "EQUAL", "user"),
    ("request.lastMessage.content", "CONTAINS", "card"),
    ("request.lastMessage.content", "NOT_CONTAINS", "kind"),
    ("request.allMessagesContent", "CONTAINS", "kind"),
    ("metadata.team", "EQUAL", "red"),
    ("metadata.tier", "EQUAL", "3"),
    ("metadata.tier", "LESS_THAN", 4),
    ("metadata.vip", "EQUAL", True),
    ("metadata.vip", "EXISTS", None),
    ("metadata.other", "NOT_EXISTS", None),
    ("metadata.other", "NOT_EQUAL", "x"),
    ("errorRate(5)", "GTE", 12.5),
    ("errorRate( 5 )", "LT", 13),
    ("capacityUsage(minute)", "GT", 79),
    ("capacityUsage('MINUTE')", "GT", 79),
]


@pytest.mark.parametrize(("expression", "comparator", "value"), HOLDS)
def test_a_comparison_that_holds(expression: str, comparator: str, value: object) -> None:
    assert takes(is_so(expression, comparator, value))


@pytest.mark.parametrize(
    ("expression", "comparator", "value"),
    [
        ("tokens.input", "GT", 100),
        ("metadata.other", "EQUAL", "x"),
        ("metadata.other", "GT", 0),
        ("metadata.team", "GT", 0),
        ("metadata.other", "EXISTS", None),
        ("errorRate(6)", "GTE", 0),
        ("capacityUsage(day)", "LT", 100),
        ("request.model", "IN", ["as", "ked"]),
    ],
)
def test_a_comparison_that_does_not(expression: str, comparator: str, value: object) -> None:
    assert not takes(is_so(expression, comparator, value))


def test_groups_combine() -> None:
    yes, no = is_so("tokens.input", "EQUAL", 100), is_so("tokens.input", "EQUAL", 1)
    assert not takes(yes, no)
    assert takes(yes, no, operator="OR")
    assert takes(yes, {"operator": "OR", "conditions": [no, {"conditions": [yes, yes]}]})
    assert not takes(yes, {"operator": "AND", "conditions": [no, yes]})


def test_what_is_missing_in_a_request_is_no_mistake() -> None:
    requests: list[Json] = [
        {},
        {"messages": []},
        {"messages": ["x"]},
        {"messages": {}, "tools": "x"},
    ]
    for request in requests:
        for expression, comparator, value in HOLDS:
            takes(is_so(expression, comparator, value), request=request)


def test_the_first_rule_that_matches_decides() -> None:
    always = [is_so("tokens.input", "GT", 0)]
    wire: Json = {
        "conditions": [
            {"if": [is_so("tokens.input", "GT", 1000)], "then": THEN},
            {"if": always, "then": THEN | {"model": "off"}, "enabled": False},
            {"if": always, "then": THEN | {"model": "second"}},
            {"if": always, "action": "BLOCK"},
        ]
    }
    found, problems = parse(wire)
    assert problems == []
    rule = decide(found, facts(), batch_id=uuid4(), seq=0)
    assert rule is not None
    assert rule.target is not None
    assert (rule.number, rule.target.model) == (2, "second")
    assert [target.model for target in found.targets] == ["large", "second"]
    assert parse({**wire, "enabled": False})[0].rules == ()
    assert parse(None) == (Rules(rules=()), [])


def test_traffic_is_a_die_that_always_falls_the_same_way() -> None:
    always = is_so("tokens.input", "GT", 0)
    found = rules(always, then=THEN | {"traffic": 30})
    batch_id = UUID(WHERE)

    def thrown() -> list[bool]:
        return [decide(found, facts(), batch_id=batch_id, seq=n) is not None for n in range(4000)]

    assert thrown() == thrown()
    assert 0.27 < sum(thrown()) / 4000 < 0.33
    # What falls through meets the next rule with a die of its own.
    two, _ = parse(
        {
            "conditions": [
                {"if": [always], "then": THEN | {"traffic": 50}},
                {"if": [always], "then": THEN | {"model": "b", "traffic": 50}},
            ]
        }
    )
    drawn = [decide(two, facts(), batch_id=batch_id, seq=n) for n in range(4000)]
    assert 0.22 < sum(rule is not None and rule.number == 1 for rule in drawn) / 4000 < 0.28


COMPARISON = is_so("tokens.input", "GT", 1)
WRONG: list[tuple[Any, str]] = [
    ({"conditions": {}}, "routing.conditions"),
    ({"enabled": "yes"}, "routing.enabled"),
    ({"conditions": [1]}, "routing.conditions[0]"),
    ({"conditions": [{"if": [], "then": THEN}]}, "routing.conditions[0].if"),
    ({"conditions": [{"if": [COMPARISON]}]}, "routing.conditions[0].then"),
    ({"conditions": [{"if": [1], "then": THEN}]}, "routing.conditions[0].if[0]"),
    (
        {"conditions": [{"if": [COMPARISON], "then": THEN, "action": "EVAL"}]},
        "routing.conditions[0].action",
    ),
    (
        {"conditions": [{"if": [COMPARISON], "then": THEN, "mode": "ADVANCED"}]},
        "routing.conditions[0].mode",
    ),
    (
        {"conditions": [{"if": [COMPARISON], "then": THEN, "operator": "XOR"}]},
        "routing.conditions[0].operator",
    ),
    ({"conditions": [{"if": [COMPARISON], "then": THEN, "x": 1}]}, "routing.conditions[0].x"),
    (
        {"conditions": [{"if": [COMPARISON], "then": {"model": "m"}}]},
        "routing.conditions[0].then.connectionId",
    ),
    (
        {"conditions": [{"if": [COMPARISON], "then": THEN | {"traffic": 0}}]},
        "routing.conditions[0].then.traffic",
    ),
    (
        {"conditions": [{"if": [COMPARISON], "then": THEN | {"traffic": True}}]},
        "routing.conditions[0].then.traffic",
    ),
]


@pytest.mark.parametrize(("wire", "path"), WRONG)
def test_rules_that_are_wrong_are_named_by_path(wire: Any, path: str) -> None:  # noqa: ANN401 - JSON
    _, problems = parse(wire)
    assert [problem.path for problem in problems] == [path]


MISTAKEN: list[tuple[Json, str]] = [
    (is_so("tokens.output", "GT", 1), "expression"),
    (is_so("request.messages[0]", "EXISTS"), "expression"),
    (is_so("process.env", "EXISTS"), "expression"),
    (is_so("metadata.", "EXISTS"), "expression"),
    (is_so("errorRate(0)", "GT", 1), "expression"),
    (is_so("errorRate(1441)", "GT", 1), "expression"),
    (is_so("capacityUsage(second)", "GT", 1), "expression"),
    (is_so("<%= 1 %>", "EXISTS"), "expression"),
    (is_so("tokens.input", "MATCHES", "a+"), "comparator"),
    (is_so("tokens.input", "GT", "1"), "value"),
    (is_so("tokens.input", "GT", value={}), "value"),
    (is_so("tokens.input", "CONTAINS", "1"), "value"),
    (is_so("request.model", "GT", 1), "value"),
    (is_so("request.model", "EQUAL", 1), "value"),
    (is_so("request.model", "IN", "a"), "value"),
    (is_so("request.model", "IN", []), "value"),
    (is_so("metadata.x", "EQUAL", {}), "value"),
    (is_so("metadata.x", "CONTAINS", "a" * 2001), "value"),
    ({"expression": "metadata.x", "comparator": "EQUAL"}, "value"),
    (is_so("metadata.x", "EXISTS") | {"flags": "i"}, "flags"),
]


@pytest.mark.parametrize(("condition", "field"), MISTAKEN)
def test_comparisons_that_are_wrong_are_named_by_path(condition: Json, field: str) -> None:
    _, problems = parse({"conditions": [{"if": [condition], "then": THEN}]})
    assert {p.path for p in problems} == {f"routing.conditions[0].if[0].{field}"}


def test_rules_are_bounded() -> None:
    deep: Json = COMPARISON
    for _ in range(20):
        deep = {"conditions": [deep]}
    many = [COMPARISON] * 300
    for conditions in ([deep], many):
        _, problems = parse({"conditions": [{"if": conditions, "then": THEN}]})
        assert len(problems) == 1
    _, problems = parse({"conditions": [{"if": [COMPARISON], "then": THEN}] * 51})
    assert [p.path for p in problems] == ["routing.conditions"]


def test_rules_of_a_connection_can_be_taken_out() -> None:
    other = str(uuid4())
    rule = {"if": [COMPARISON], "then": THEN}
    wire = {"conditions": [rule, rule | {"then": THEN | {"connectionId": other}}]}
    left = without(wire, UUID(WHERE))
    assert left["conditions"] == [wire["conditions"][1]]
