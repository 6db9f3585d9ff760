"""What roles and permissions allow: the rules themselves, without a server."""

import re
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import access
from app.access import ACTIONS, EVERYTHING, MEMBERS_KEY, Principal, Role, key_allows, role_allows
from app.ids import uuid7


def key(*permissions: str) -> Principal:
    return Principal(
        workspace_id=uuid7(),
        environment_id=uuid7(),
        name="k",
        resources=["*"],
        permissions=permissions,
        api_key_id=uuid7(),
    )


def user(role: Role) -> Principal:
    return Principal(
        workspace_id=uuid7(),
        environment_id=uuid7(),
        name="u",
        resources=["*"],
        user_id=uuid7(),
        role=role,
    )


@pytest.mark.parametrize(
    ("pattern", "action", "allowed"),
    [
        ("*", "completion-batch:create", True),
        ("completion-batch:*", "completion-batch:create", True),
        ("completion-batch:create", "completion-batch:create", True),
        ("*:get", "completion-batch:get", True),
        ("*:*", "completion-batch:get", True),
        ("completion-*:g*t", "completion-batch:get", True),
        # Anchored at both ends, and nothing but * is special.
        ("completion-batch:get", "completion-batch:get-all", False),
        ("batch:get", "completion-batch:get", False),
        ("completion-batch", "completion-batch:get", False),
        ("completion-batch:", "completion-batch:get", False),
        ("completion.batch:get", "completion-batch:get", False),
        ("completion-batch:g?t", "completion-batch:get", False),
        ("get", "completion-batch:get", False),
        ("*:getget*", "completion-batch:get", False),
        ("completion-batch:get*get", "completion-batch:get", False),
        ("", "completion-batch:get", False),
        ("COMPLETION-BATCH:GET", "completion-batch:get", False),
    ],
)
def test_permissions_are_anchored_patterns(pattern: str, action: str, *, allowed: bool) -> None:
    assert key_allows([pattern], action) is allowed


def test_a_key_stays_in_its_environment_whatever_it_is_given() -> None:
    for action in ACTIONS:
        noun, verb = action.split(":")
        above = noun in ("workspace", "workspace-member", "environment", "user")
        given = ["*", noun + ":*", action]
        assert key_allows(given, action) is (not above or verb in ("get", "list")), action


def test_what_each_role_may() -> None:
    assert set(access.ROLES) == set(get_args(Role))
    for action in ACTIONS:
        assert role_allows("owner", action)
        assert role_allows("read-only", action) is action.endswith((":get", ":list"))
    lacking = {a for a in ACTIONS if not role_allows("member", a)}
    assert lacking == {
        "workspace:delete",
        "workspace-member:create",
        "workspace-member:update",
        "workspace-member:delete",
        "api-key:permit",
    }


def test_the_document_names_every_action_and_what_a_members_key_may_do() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "access.md").read_text("utf-8")
    table = text.partition("### Actions")[2].partition("## People")[0]
    named = re.findall(r"`([a-z-]+:[a-z]+)`( \(owners\))?", table)
    assert {action for action, _ in named} == set(ACTIONS)
    assert {action for action, note in named if note} == access.OWNERS_ONLY
    assert all(f"`{pattern}`" in text for pattern in MEMBERS_KEY)


def test_nobody_gives_a_key_more_than_they_have() -> None:
    assert user("owner").may_give(["*"])
    assert not user("member").may_give(["*"])
    assert not user("member").may_give(["api-key:*"])
    assert user("member").may_give(MEMBERS_KEY)
    assert not user("read-only").may_give(["completion-batch:*"])
    assert user("read-only").may_give(["*:get", "*:list"])
    assert key(*EVERYTHING).may_give(["*", "*:get"])
    assert key("completion-batch:*").may_give(["completion-batch:get", "completion-batch:*"])
    assert key("completion-batch:*").may_give(["completion-batch:g*"])
    assert not key("completion-batch:*").may_give(["*"])
    assert not key("completion-batch:*").may_give(["*:get"])
    assert not key("completion-batch:get", "completion-batch:list").may_give(["completion-batch:*"])
    assert not key().may_give(["completion-batch:get"])
    assert key().may_give([])


words = st.text(alphabet="ab:*", max_size=8)


@given(st.lists(words, max_size=3), st.lists(words, max_size=3), st.text("ab:", max_size=8))
def test_what_was_given_never_allows_more(own: list[str], given: list[str], action: str) -> None:
    if key(*own).may_give(given) and key_allows(given, action):
        assert key_allows(own, action)


def test_a_hostile_pattern_costs_nothing() -> None:
    begun = time.perf_counter()
    for _ in range(1000):
        key_allows(["*a" * 50 + "b"], "a" * 60)
    assert time.perf_counter() - begun < 1.0
