"""The splitter finds the same parts as a parser, wherever the text is cut into pieces."""

import io
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.splitter import MalformedError, Splitter, TooLongError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(['"', "\\", '\\"', "]}", "[{", '{"items":[', "\\u0000", "a\\\\"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)
DOCUMENTS = st.dictionaries(
    st.sampled_from(["type", "name", "metadata", "é", '"', "\\", ""]), VALUES, max_size=5
).flatmap(
    lambda members: st.lists(VALUES, max_size=6).flatmap(
        lambda items: st.permutations([*members.items(), ("items", items)]).map(dict)
    )
)


def deep(depth: int) -> str:
    return "[" * depth + '"]"' + "]" * depth


def splitter(text: bytes, *, step: int = 7, most: int = 100_000) -> Splitter:
    return Splitter(
        io.BytesIO(text).read, array="items", most_element=most, most_member=most, step=step
    )


def parts(text: bytes, *, step: int = 7, most: int = 100_000) -> dict[str, Any]:
    """What the splitter makes of a text, each part parsed by Python's own parser."""
    found: dict[str, Any] = {}
    split = splitter(text, step=step, most=most)
    for name, raw in split.members():
        if name == "items" and split.elements_at is not None:
            found.setdefault("items", []).append(json.loads(raw))
        else:
            found[name] = json.loads(raw)
    if split.elements_at is not None:
        found.setdefault("items", [])
    return found


@settings(deadline=None)  # the machine may be busy
@given(
    document=DOCUMENTS,
    step=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_it_agrees_with_a_parser_however_the_text_is_cut(
    document: dict[str, Any], *, step: int, ascii_only: bool, indent: int | None, mark: bytes
) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    assert parts(mark + text, step=step) == json.loads(text)


@settings(deadline=None)  # the machine may be busy
@given(document=DOCUMENTS, step=st.integers(1, 40), data=st.data())
def test_a_text_that_breaks_off_is_refused_wherever_it_breaks(
    document: dict[str, Any], step: int, data: st.DataObject
) -> None:
    text = json.dumps(document).encode()
    end = data.draw(st.integers(0, len(text) - 1))
    # A scalar that breaks off is found, such as "nul"; whoever decodes it refuses it.
    with pytest.raises((MalformedError, json.JSONDecodeError)):
        parts(text[:end], step=step)


@settings(deadline=None)  # the machine may be busy
@given(document=DOCUMENTS, step=st.integers(1, 40))
def test_elements_can_be_walked_again_from_where_they_began(
    document: dict[str, Any], step: int
) -> None:
    text = json.dumps(document).encode()
    first = splitter(text, step=step)
    for _ in first.members():
        pass
    assert first.elements_at is not None
    again = splitter(text[first.elements_at :], step=step)
    assert [json.loads(raw) for raw in again.elements()] == document["items"]


@pytest.mark.parametrize("depth", [1, 6, 7, 8, 500])
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_nesting_deeper_than_one_expression_is_measured(depth: int, step: int) -> None:
    text = f'{{"items":[{deep(depth)},1],"after":{deep(depth)}}}'.encode()
    assert parts(text, step=step) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected an object"),
        ("[]", "expected an object"),
        ('{"items":[]}x', "there is more"),
        ('{"items":[]} {}', "there is more"),
        ('{"items":[1,]}', "expected a value"),
        ('{"items":[1 2]}', "expected ] or ,"),
        ('{"a":1 "b":2}', "expected } or ,"),
        ('{"a":1,}', "name in quotes"),
        ('{"a"}', "expected :"),
        ("{a:1}", "name in quotes"),
        ('{"items":[1],"items":[2]}', "comes twice"),
        ('{"a":1,"a":2}', "comes twice"),
        ('{"a":1,"\\u0061":2}', "comes twice"),
        ('{"a":}', "expected a value"),
        ('{"a":' + "[" * 5000 + "]" * 5000 + "}", "nested more than"),
    ],
)
def test_what_is_no_object_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(MalformedError, match="is not valid JSON at byte") as caught:
        parts(text.encode())
    assert why in str(caught.value)


def test_other_bytes_than_utf8_are_refused() -> None:
    for bad in (b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xe2\x82'):
        with pytest.raises(MalformedError):
            parts(bad)


def test_a_part_beyond_its_limit_is_refused_without_being_read_to_its_end() -> None:
    endless = io.BytesIO(b'{"items":["a","' + b"x" * 5_000_000 + b'"]}')
    split = Splitter(endless.read, array="items", most_element=10_000, step=1000)
    members = split.members()
    assert next(members) == ("items", b'"a"')
    with pytest.raises(TooLongError) as caught:
        next(members)
    assert (caught.value.index, caught.value.key) == (1, "items")
    assert endless.tell() < 50_000


def test_a_million_escapes_and_brackets_cost_neither_memory_nor_backtracking() -> None:
    text = b'{"items":[{"a":"' + b"\\n" * 1_000_000 + b'"},[' + b"[1]," * 500_000 + b"1]]}"
    assert len(parts(text, step=1 << 20, most=1 << 24)["items"]) == 2


# Elements that begin alike, as those of a batch do, between others that do not.
ALIKE = st.lists(VALUES.map(lambda value: {"resource": value}), max_size=30)


def elements(text: bytes, *, step: int, most: int, decode: bool) -> list[bytes] | str:
    """The elements as they come out, or what is said to be wrong."""
    found: list[bytes] = []
    split = splitter(text, step=step, most=most)
    members = split.members(msgspec.json.Decoder(list[msgspec.Raw]).decode if decode else _never)
    try:
        for name, part in members:
            if isinstance(part, list):
                found += map(bytes, part)
            elif name == "items":
                found.append(part)
    except (MalformedError, TooLongError) as error:
        return str(error)
    return found


def _never(_: bytes) -> list[msgspec.Raw]:
    raise msgspec.DecodeError


@settings(deadline=None)  # the machine may be busy
@given(
    items=ALIKE | st.lists(VALUES, max_size=8),
    indent=st.sampled_from([None, 1]),
    step=st.integers(1, 400),
    most=st.sampled_from([60, 400, 100_000]),
    data=st.data(),
)
def test_stretches_hold_what_would_have_come_one_by_one(
    items: list[Any], indent: int | None, step: int, most: int, data: st.DataObject
) -> None:
    """Also of a text with something wrong at any place."""
    text = bytearray(json.dumps({"items": items, "z": 1}, indent=indent).encode())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + 1] = data.draw(
            st.sampled_from([b"", b",", b"]", b"}", b'"', b"\xff", b"{"])
        )
    one_by_one = elements(bytes(text), step=step, most=most, decode=False)
    assert elements(bytes(text), step=step, most=most, decode=True) == one_by_one


def test_elements_that_begin_alike_come_in_stretches() -> None:
    text = json.dumps({"items": [{"resource": "a", "n": n} for n in range(1000)]}).encode()
    split = splitter(text, step=10_000)
    parts = [part for _, part in split.members(msgspec.json.Decoder(list[msgspec.Raw]).decode)]
    assert sum(len(part) for part in parts if isinstance(part, list)) > 980
    assert sum(isinstance(part, bytes) for part in parts) < 20
