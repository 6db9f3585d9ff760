"""Token estimates, against tiktoken with the vocabularies that OpenAI publishes."""

import hashlib
import json
import time
import unicodedata
from base64 import b64encode
from functools import cache
from typing import Any

import pytest
import tiktoken
import toktok  # pyright: ignore[reportMissingTypeStubs] - has none
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public  # pyright: ignore[reportMissingTypeStubs] - has none

from app import tokens
from app.tokens import Estimate, Tally, estimate

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
MODERATIONS = "/v1/moderations"
ENDPOINTS = [CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS, MODERATIONS]
MODEL = "gpt-4"
MODELS = {"cl100k_base": MODEL, "o200k_base": "gpt-4o"}

PROSE = "The quick brown fox doesn't jump over 12 lazy dogs; it sleeps.\n"


@cache
def published(name: str) -> tiktoken.Encoding:
    """The reference: tiktoken, its pattern, and the vocabulary whose digest it expects.

    What tiktoken would download is written anew from what toktok carries, so that no network is
    needed; the digest proves that both are the same to the byte.
    """

    def carried(_url: str, expected_hash: str) -> dict[bytes, int]:
        look: Any = toktok._encoding  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType] - a test may look inside
        vocabulary = look(name)
        ranks: dict[bytes, int] = {}
        for rank in range(vocabulary.n_vocab):
            try:
                if not vocabulary.is_special_token(rank):
                    ranks[vocabulary.decode_single_token_bytes(rank)] = rank
            except KeyError:
                pass  # ranks that no token has
        file = b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items())
        assert hashlib.sha256(file).hexdigest() == expected_hash
        return ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", carried)
        parts: dict[str, Any] = openai_public.ENCODING_CONSTRUCTORS[name]()
        return tiktoken.Encoding(**parts)


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Both vocabularies, so that no test's time is that of loading one."""
    for name, model in MODELS.items():
        _ = published(name)
        _ = estimate(EMBEDDINGS, {"input": name}, model=model)


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    """The vocabulary of `MODEL`."""
    return published("cl100k_base")


def inputs(endpoint: str, **body: object) -> int:
    return estimate(endpoint, body, model=MODEL).input_tokens


def outputs(endpoint: str, **body: object) -> int | None:
    return estimate(endpoint, body, model=MODEL).max_output_tokens


def said(content: object, role: str = "user") -> dict[str, object]:
    return {"role": role, "content": content}


# --- text -----------------------------------------------------------------------------------


def test_text_counts_as_tiktoken_counts_it(cl100k: tiktoken.Encoding) -> None:
    assert inputs(EMBEDDINGS, input=PROSE) == len(cl100k.encode_ordinary(PROSE))


# Each library knows the Unicode of its day: what Python's does not know yet is left out.
ANY_CHARACTER = st.characters(exclude_categories=("Cs", "Cn"))
ODD = st.sampled_from(
    [
        "<|endoftext|>",
        "'S",
        "\u017f",
        "\r\n ",
        " \n",
        "\u3000",
        "\x85",
        "\u0301",
        "\U0001f469\u200d",
        "中",
    ]
)
ODD_TEXT = st.lists(
    st.tuples(
        ODD | ANY_CHARACTER | st.text(max_size=8, alphabet="aZ'sT 09-/=\n\t"), st.integers(1, 40)
    ),
    max_size=12,
).map(lambda parts: "".join(part * times for part, times in parts))


@pytest.mark.parametrize("name", MODELS)
@given(text=st.text(ANY_CHARACTER) | ODD_TEXT)
def test_any_text_counts_as_tiktoken_counts_it(name: str, text: str) -> None:
    counted = estimate(EMBEDDINGS, {"input": text}, model=MODELS[name]).input_tokens
    assert counted == len(published(name).encode_ordinary(text))


@pytest.mark.parametrize("name", MODELS)
def test_every_character_counts_as_tiktoken_counts_it(name: str) -> None:
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] != "C"]
    tally = Tally()
    reference: list[int] = []
    for start in range(0, len(known), 100):
        text = "".join(f"a{c} {c}b" for c in known[start : start + 100])
        tally.add(EMBEDDINGS, {"input": text}, model=MODELS[name])
        reference.append(len(published(name).encode_ordinary(text)))
    assert [found.input_tokens for found in tally.estimates()] == reference


def test_special_tokens_are_ordinary_text() -> None:
    assert inputs(EMBEDDINGS, input="<|endoftext|>") > 1


def test_lone_surrogates_are_counted() -> None:
    assert inputs(EMBEDDINGS, input="a\ud800b") >= 2
    assert inputs(CHAT, messages=[said([{"type": "x", "y": "a\ud800b"}])]) > 6
    assert inputs(CHAT, messages=[], tools=[{"name": "\udcff"}]) > 3


def test_long_text_is_counted_to_the_end() -> None:
    text = PROSE * 20_000
    parts = [PROSE] * 20_000
    assert inputs(EMBEDDINGS, input=text) == inputs(EMBEDDINGS, input=parts)


@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize(
    "character", ["a", " ", "\t", "\n", "-", "中", "\u3000", "\u0301", "😀", "aB", " \n"]
)
def test_half_a_million_times_the_same_character_is_quick(character: str, model: str) -> None:
    """tiktoken panics on a million spaces, and is quadratic in others."""
    started = time.process_time()
    body = {"input": (character * 500_000)[:500_000]}
    assert 1_000 < estimate(EMBEDDINGS, body, model=model).input_tokens <= 2_000_000
    assert time.process_time() - started < 2


# --- chat -----------------------------------------------------------------------------------


def test_a_chat_costs_priming_and_three_per_message(cl100k: tiktoken.Encoding) -> None:
    texts = ["You are terse.", "Say hello to everybody here."]
    messages = [said(texts[0], "system"), said(texts[1])]
    text = sum(len(cl100k.encode_ordinary(t)) for t in [*texts, "system", "user"])
    assert inputs(CHAT, messages=messages) == 3 + 2 * 3 + text


def test_a_name_costs_itself_and_one() -> None:
    plain = inputs(CHAT, messages=[said("hi")])
    assert inputs(CHAT, messages=[{**said("hi"), "name": "user"}]) == plain + 2


def test_text_parts_count_as_their_text() -> None:
    parts = [{"type": "text", "text": PROSE}, {"type": "text", "text": "hi"}]
    apart = inputs(CHAT, messages=[said(PROSE)]) + inputs(EMBEDDINGS, input="hi")
    assert inputs(CHAT, messages=[said(parts)]) == apart


@pytest.mark.parametrize(
    ("part", "price"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}, tokens.IMAGE),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, tokens.IMAGE),
        ({"type": "image_url", "image_url": {"url": "u", "detail": "low"}}, tokens.IMAGE_LOW),
        ({"type": "image_url", "image_url": {"url": "u", "detail": "high"}}, tokens.IMAGE),
        ({"type": "input_image", "image_url": "u", "detail": "low"}, tokens.IMAGE_LOW),
        ({"type": "image_url"}, tokens.IMAGE),
        ({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, tokens.AUDIO),
        ({"type": "file", "file": {"file_data": "data:;base64,AA"}}, tokens.FILE),
        ({"type": "input_file", "file_id": "file-1"}, tokens.FILE),
    ],
)
def test_media_has_a_flat_price(part: dict[str, object], price: int) -> None:
    empty = inputs(CHAT, messages=[said([])])
    assert inputs(CHAT, messages=[said([part])]) == empty + price


def test_base64_of_an_unknown_part_is_not_tokenised() -> None:
    data = "data:image/png;base64," + "QUJD" * 50_000
    assert inputs(CHAT, messages=[said([{"type": "new", "new": data}])]) < 1_000
    assert inputs(CHAT, messages=[said("hi")], tools=[{"icon": data}]) < 1_000


def test_tools_schemas_and_calls_count_as_their_json(cl100k: tiktoken.Encoding) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    price = len(cl100k.encode_ordinary(json.dumps([tool], separators=(",", ":"))))
    plain = inputs(CHAT, messages=[said("hi")])
    for key in ("tools", "functions", "response_format"):
        assert inputs(CHAT, messages=[said("hi")], **{key: [tool]}) == plain + price
    assert inputs(CHAT, messages=[{**said("hi"), "tool_calls": [tool]}]) == plain + price
    assert inputs(CHAT, messages=[{**said("hi"), "tool_calls": None}]) == plain


# --- the other endpoints --------------------------------------------------------------------


def test_responses_take_a_string_or_items() -> None:
    string = inputs(RESPONSES, input=PROSE)
    items = inputs(RESPONSES, input=[{"type": "message", **said(PROSE)}])
    parts = inputs(RESPONSES, input=[said([{"type": "input_text", "text": PROSE}])])
    assert items == parts == string + 1  # the role
    assert inputs(RESPONSES, input=PROSE, instructions="Be brief.") > string + 3
    assert inputs(RESPONSES, input=PROSE, tools=[{"type": "web_search"}]) > string


def test_items_of_responses_count_what_the_model_reads() -> None:
    called = {"type": "function_call_output", "call_id": "c", "output": PROSE}
    assert inputs(RESPONSES, input=[called]) > inputs(EMBEDDINGS, input=PROSE)
    shot = {"type": "computer_call_output", "output": {"type": "computer_screenshot"}}
    assert inputs(RESPONSES, input=[shot]) == 3 + 3 + tokens.IMAGE
    thought = {"type": "reasoning", "id": "rs_1", "encrypted_content": "QUJD" * 10_000}
    assert inputs(RESPONSES, input=[thought]) == 3 + 3


def test_inputs_of_embeddings_are_texts_or_token_ids() -> None:
    one = inputs(EMBEDDINGS, input=PROSE)
    assert inputs(EMBEDDINGS, input=[PROSE, PROSE]) == 2 * one
    assert inputs(EMBEDDINGS, input=[1, 2, 3]) == 3
    assert inputs(EMBEDDINGS, input=[[1, 2, 3], [4, 5]]) == 5


def test_moderations_take_text_and_images() -> None:
    image = {"type": "image_url", "image_url": {"url": "u"}}
    text = {"type": "text", "text": PROSE}
    one = inputs(MODERATIONS, input=PROSE)
    assert inputs(MODERATIONS, input=[text, image]) == one + tokens.IMAGE


def test_prompts_of_completions_are_texts_or_token_ids() -> None:
    one = inputs(COMPLETIONS, prompt=PROSE)
    assert inputs(COMPLETIONS, prompt=[PROSE, PROSE]) == 2 * one
    assert inputs(COMPLETIONS, prompt=[1, 2]) == 2
    assert inputs(COMPLETIONS, prompt=PROSE, suffix=PROSE) == 2 * one


# --- output ---------------------------------------------------------------------------------


def test_the_smallest_bound_holds_for_every_choice() -> None:
    assert outputs(CHAT, max_tokens=100) == 100
    assert outputs(CHAT, max_completion_tokens=70, max_tokens=100, n=3) == 210
    assert outputs(RESPONSES, max_output_tokens=50, n=3) == 50
    assert outputs(COMPLETIONS, prompt=["a", "b"], max_tokens=10, n=2) == 40
    assert outputs(COMPLETIONS, prompt=[1, 2], max_tokens=10, best_of=5) == 50


def test_without_a_valid_bound_the_output_is_unknown() -> None:
    assert outputs(CHAT) is None
    for wrong in ("100", True, 0, -1, 1.5, None, [5]):
        assert outputs(CHAT, max_tokens=wrong) is None
        assert outputs(CHAT, max_tokens=9, n=wrong) == 9


def test_nothing_is_generated_by_embeddings_and_moderations() -> None:
    assert outputs(EMBEDDINGS, input="a", max_tokens=100) == 0
    assert outputs(MODERATIONS, input="a") == 0


def test_absurd_numbers_still_fit_a_postgres_integer() -> None:
    assert outputs(CHAT, max_tokens=10**30, n=10**9) == 2**31 - 1


# --- any json -------------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=()))
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
KEYS = [
    *("messages", "input", "prompt", "tools", "instructions", "n", "max_tokens", "suffix", "text"),
    *("response_format", "content", "role", "name", "type", "image_url", "output", "best_of"),
]
odd_json = st.recursive(
    any_json | st.sampled_from(["image_url", "text", "system", "input_audio"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=120)
@given(
    st.sampled_from([*ENDPOINTS, "/v1/unknown"]),
    st.dictionaries(st.sampled_from(KEYS) | any_text, odd_json, max_size=6),
    any_text,
)
def test_no_json_raises(endpoint: str, body: dict[str, object], model: str) -> None:
    estimated = estimate(endpoint, body, model=model if model.isascii() else MODEL)
    assert estimated.input_tokens >= 0
    assert estimated.max_output_tokens is None or estimated.max_output_tokens >= 0


def test_nesting_too_deep_for_json_does_not_raise() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert inputs(CHAT, messages=[said(deep)]) > 0
    assert inputs(CHAT, messages=deep) > 0


def test_a_wrong_shape_counts_as_its_json() -> None:
    wrong = {"a": [1, 2, {"b": PROSE}]}
    assert inputs(CHAT, messages=wrong) > inputs(EMBEDDINGS, input=PROSE)
    assert inputs(CHAT, messages=[PROSE]) > inputs(EMBEDDINGS, input=PROSE)
    assert inputs("/v1/unknown", x=PROSE) > inputs(EMBEDDINGS, input=PROSE)


# --- many at once ---------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(ENDPOINTS), odd_json, st.sampled_from([*MODELS.values(), "new"])),
        max_size=8,
    )
)
def test_a_tally_estimates_each_as_if_it_were_alone(
    requests: list[tuple[str, object, str]],
) -> None:
    tally = Tally()
    alone: list[Estimate] = []
    for endpoint, content, model in requests:
        body = {"messages": [said(content, "system"), said(content)], "input": content, "n": 2}
        tally.add(endpoint, body, model=model)
        alone.append(estimate(endpoint, body, model=model))
    assert tally.estimates() == alone


def test_half_of_a_pair_spoils_no_other_count() -> None:
    tally = Tally()
    for text in (PROSE, "a\ud800b", PROSE):
        tally.add(EMBEDDINGS, {"input": text}, model=MODEL)
    counted = [found.input_tokens for found in tally.estimates()]
    reference = published("cl100k_base")
    assert counted == [len(reference.encode_ordinary(t)) for t in (PROSE, "a\ud800b", PROSE)]


# --- vocabularies ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-oss-120b", "o200k_base"),
        ("claude-of-tomorrow", "o200k_base"),
        ("", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("text-davinci-003", "cl100k_base"),
    ],
)
def test_a_model_is_counted_with_its_vocabulary(model: str, name: str) -> None:
    text = "中文 tokenisation über 12345"
    others = {len(published(each).encode_ordinary(text)) for each in MODELS}
    assert len(others) == len(MODELS)
    counted = estimate(EMBEDDINGS, {"input": text}, model=model).input_tokens
    assert counted == len(published(name).encode_ordinary(text))


def test_every_vocabulary_of_tiktoken_has_its_stand_in() -> None:
    for model in tiktoken.model.MODEL_TO_ENCODING:
        assert estimate(EMBEDDINGS, {"input": "hi"}, model=model).input_tokens == 1


def test_after_loading_no_request_waits_for_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one holds the interpreter's lock: an event stream stood still for a second."""
    loaded: dict[tuple[str, str], object] = {}
    monkeypatch.setattr(toktok, "_CACHE", loaded)
    tokens.load()
    assert {name for name, _ in loaded} == set(MODELS)
