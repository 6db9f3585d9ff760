"""Token estimates: what a request will take from a limit, before a provider has said so.

An estimate is reserved at the claim and replaced by the provider's own ``usage`` at settlement, so
it has to be close and cheap rather than exact. Text is counted exactly, with the vocabulary of the
model as tiktoken names it (``o200k_base`` for models it does not know); what is not text has a flat
price, see the constants.

The vocabularies that OpenAI's models still use are part of the package ``toktok``: nothing is fetched,
at no time. ``cl100k_base`` stands in for those of models withdrawn in January 2024.

Cost. Counting many texts in one call releases the interpreter and is some twenty times as fast as
tiktoken with the same counts: 2 microseconds of CPU instead of 35 for 90 words, and linear in the length of
a text whatever it holds. A call of its own costs 20 more. So texts are gathered in a `Tally` and counted
together; what requests have in common (system prompt, tools) is counted once of each tally. Megabytes
take tens of milliseconds: call it from a worker thread, never from an event loop. The vocabularies take 110 MB.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Final, TypeGuard

import msgspec
import tiktoken
import toktok  # pyright: ignore[reportMissingTypeStubs] - typed, without the marker

IMAGE: Final = 765
"""A 1024x1024 image in high detail, by OpenAI's tile formula: 85 + 4 tiles x 170."""

IMAGE_LOW: Final = 85
"""An image sent with ``"detail": "low"``."""

AUDIO: Final = 600
"""One minute of speech at OpenAI's one token per 100 ms."""

FILE: Final = 2_000
"""An attached document or video: a few pages. Nothing cheap tells more."""

_REPLY: Final = 3  # every reply is primed with <|start|>assistant<|message|>
_MESSAGE: Final = 3  # OpenAI cookbook, "How to count tokens with tiktoken"
_NAME: Final = 1
_LARGEST: Final = 2**31 - 1  # fits Postgres' integer, whatever a client wrote

_BOUNDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")

_DEFAULT: Final = "o200k_base"
# Special tokens are ordinary text here, so these two differ in nothing that is counted.
_CARRIED: Final = {
    "cl100k_base": "cl100k_base",
    "o200k_base": "o200k_base",
    "o200k_harmony": "o200k_base",
}
_STAND_IN: Final = "cl100k_base"

_IMAGES: Final = {"image_url", "input_image", "image", "computer_screenshot"}
_FLAT: Final = {
    "image_generation_call": IMAGE,
    "input_audio": AUDIO,
    "audio": AUDIO,
    "audio_url": AUDIO,
    "file": FILE,
    "input_file": FILE,
    "video_url": FILE,
}
_NOT_TEXT: Final = {"type", "id", "status", "encrypted_content"}
_DATA_URL: Final = re.compile(r'"data:[^",]{0,200};base64,[^"]*"')


class Estimate(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # made by the thousand
    """``max_output_tokens`` is the most that the request allows over all its choices.

    It is None where the request sets no bound, and 0 where nothing is generated.
    """

    input_tokens: int
    max_output_tokens: int | None


_Request = tuple["_Texts", int, int, list[int], int, int | None]
"""Where its own texts begin and end, those it shares, its flat tokens and its most output tokens."""


class Tally:
    """Estimates many requests at once: `add` each, then take all ``estimates``."""

    def __init__(self) -> None:
        self._gathered: dict[str, _Texts] = {}
        self._requests: list[_Request] = []

    def add(self, endpoint: str, body: Mapping[str, object], *, model: str) -> None:
        """Take a request in; never raises, whatever JSON the body holds.

        ``endpoint`` is the path, as in ``/v1/chat/completions``. What has an unexpected shape counts
        as the tokens of its JSON text.
        """
        vocabulary = _vocabulary(model)
        texts = self._gathered.get(vocabulary)
        if texts is None:
            texts = self._gathered[vocabulary] = _Texts()
        texts.shared = []
        first = len(texts.own)
        flat, most = _gather(texts, endpoint, body)
        self._requests.append((texts, first, len(texts.own), texts.shared, flat, most))

    def estimates(self) -> list[Estimate]:
        """Of the requests in their order."""
        for vocabulary, texts in self._gathered.items():
            texts.count(vocabulary)
        return [
            Estimate(
                input_tokens=min(
                    flat
                    + texts.upto[end]
                    - texts.upto[first]
                    + sum(map(texts.each.__getitem__, shared)),
                    _LARGEST,
                ),
                max_output_tokens=most,
            )
            for texts, first, end, shared, flat, most in self._requests
        ]


def estimate(endpoint: str, body: Mapping[str, object], *, model: str) -> Estimate:
    """Estimate a single request, as a `Tally` does."""
    tally = Tally()
    tally.add(endpoint, body, model=model)
    return tally.estimates()[0]


def load() -> None:
    """Load the vocabularies now: the first use of one stops every thread for half a second."""
    for vocabulary in set(_CARRIED.values()):
        _ = _counts(vocabulary, [""])


# --- what is counted ------------------------------------------------------------------------
#
# Each function gathers the texts of its part and returns the tokens of what is no text.


def _gather(texts: "_Texts", endpoint: str, body: Mapping[str, object]) -> tuple[int, int | None]:
    """A request's flat tokens, and the most that it may be answered with."""
    outputs = _positive(body.get("n")) or 1
    match endpoint:
        case "/v1/chat/completions":
            flat = _chat(texts, body)
        case "/v1/responses":
            flat = _responses(texts, body)
            outputs = 1
        case "/v1/completions":
            prompt = body.get("prompt")
            flat = _input(texts, prompt) + _value(texts, body.get("suffix"))
            outputs = max(outputs, _positive(body.get("best_of")) or 1) * _prompts(prompt)
        case "/v1/embeddings" | "/v1/moderations":
            flat = _input(texts, body.get("input"))
            outputs = 0
        case _:
            flat = _json(texts, body)
    return flat, _max_output(body, outputs)


def _chat(texts: "_Texts", body: Mapping[str, object]) -> int:
    messages = body.get("messages")
    tokens = _REPLY + _schemas(texts, body, ("tools", "functions", "response_format"))
    if not _is_list(messages):
        return tokens + _value(texts, messages)
    for message in messages:  # not sum(): a generator costs more than what it adds up
        tokens += _message(texts, message)
    return tokens


def _responses(texts: "_Texts", body: Mapping[str, object]) -> int:
    given = body.get("input")
    tokens = _REPLY + _schemas(texts, body, ("tools", "text"))
    instructions = body.get("instructions")
    if instructions is not None:
        tokens += _MESSAGE + _shared(texts, instructions)
    if _is_list(given):
        return tokens + sum(_message(texts, item) for item in given)
    return tokens + _MESSAGE + _value(texts, given)


def _message(texts: "_Texts", message: object) -> int:
    if not _is_object(message):
        return _MESSAGE + _value(texts, message)
    flat = _media(message)
    if flat is not None:
        return flat
    role = message.get("role")
    repeats = role in ("system", "developer")
    tokens = _MESSAGE
    for key, value in message.items():
        if key in ("content", "output"):
            tokens += _content(texts, value, repeats=repeats)
        elif key == "role":
            tokens += _shared(texts, value)
        elif key not in _NOT_TEXT:
            tokens += _value(texts, value) + (_NAME if key == "name" else 0)
    return tokens


def _content(texts: "_Texts", content: object, *, repeats: bool) -> int:
    if _is_list(content):
        return sum(_part(texts, part) for part in content)
    if _is_object(content):
        return _part(texts, content)
    return _shared(texts, content) if repeats else _value(texts, content)


def _part(texts: "_Texts", part: object) -> int:
    if not _is_object(part):
        return _value(texts, part)
    flat = _media(part)
    if flat is not None:
        return flat
    for key in ("text", "refusal"):
        text = part.get(key)
        if isinstance(text, str):
            texts.own.append(text)
            return 0
    return _json(texts, part)


def _media(part: Mapping[str, object]) -> int | None:
    """The flat price of what is not text, so that nobody tokenises base64; None for the rest."""
    kind = part.get("type")
    if not isinstance(kind, str):
        return None
    if kind in _IMAGES:
        image = part.get("image_url")
        told = image if _is_object(image) else part
        return IMAGE_LOW if told.get("detail") == "low" else IMAGE
    return _FLAT.get(kind)


def _schemas(texts: "_Texts", body: Mapping[str, object], keys: Iterable[str]) -> int:
    flat = 0
    for key in keys:
        value = body.get(key)
        if value:
            flat += _shared(texts, value)
    return flat


def _input(texts: "_Texts", given: object) -> int:
    """Text, token ids, or a list of either, or of content parts (multimodal moderation)."""
    if not _is_list(given):
        return _value(texts, given)
    tokens = 0
    for one in given:
        if isinstance(one, int):
            tokens += 1
        elif _is_list(one) and all(isinstance(token, int) for token in one):
            tokens += len(one)
        else:
            tokens += _part(texts, one)
    return tokens


def _prompts(prompt: object) -> int:
    """How many prompts a completions request carries: each gets its own answers."""
    if _is_list(prompt) and not any(isinstance(one, int) for one in prompt):
        return max(len(prompt), 1)
    return 1


def _max_output(body: Mapping[str, object], outputs: int) -> int | None:
    if outputs == 0:
        return 0
    least: int | None = None
    for key in _BOUNDS:
        bound = _positive(body.get(key))
        if bound is not None and (least is None or bound < least):
            least = bound
    return None if least is None else min(least * outputs, _LARGEST)


def _positive(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if value > 0 else None


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _is_object(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)  # several times faster than a check for `Mapping`


# --- counting -------------------------------------------------------------------------------


class _Texts:
    """What is to be counted with one vocabulary."""

    __slots__ = ("_places", "each", "once", "own", "shared", "upto")

    def __init__(self) -> None:
        self.own: list[str] = []
        self.once: list[str] = []
        self.shared: list[int] = []
        """Which of ``once`` the request at hand has."""
        self.upto: list[int] = []
        """Tokens of ``own`` up to each, once counted; so a request's are a difference."""
        self.each: list[int] = []
        """Tokens of each of ``once``, once counted."""
        self._places: dict[str, int] = {}

    def share(self, text: str) -> None:
        """Add a text that other requests probably have, too."""
        place = self._places.setdefault(text, len(self.once))
        if place == len(self.once):
            self.once.append(text)
        self.shared.append(place)

    def count(self, vocabulary: str) -> None:
        """Count all of them."""
        self.upto = list(accumulate(_counts(vocabulary, self.own), initial=0))
        self.each = _counts(vocabulary, self.once)


def _counts(vocabulary: str, texts: list[str]) -> list[int]:
    try:
        # One thread: the other cores belong to the database and to other requests.
        return toktok.batch_count(texts, vocabulary, threads=1)
    except UnicodeEncodeError:
        return toktok.batch_count([_whole(text) for text in texts], vocabulary, threads=1)


def _whole(text: str) -> str:
    """As tiktoken reads it: with a replacement character for each half of a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _value(texts: _Texts, value: object) -> int:
    if isinstance(value, str):
        texts.own.append(value)
        return 0
    return 0 if value is None else _json(texts, value)


def _shared(texts: _Texts, value: object) -> int:
    """As `_value`, for what the requests of a batch have in common."""
    if value is None:
        return 0
    text, flat = (value, 0) if isinstance(value, str) else _without_images(_json_text(value))
    texts.share(text)
    return flat


def _json(texts: _Texts, value: object) -> int:
    text, flat = _without_images(_json_text(value))
    texts.own.append(text)
    return flat


def _without_images(text: str) -> tuple[str, int]:
    """JSON without the images in it, and their tokens."""
    if ";base64," not in text:
        return text, 0
    text, images = _DATA_URL.subn('""', text)
    return text, images * IMAGE


def _json_text(value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        return ""  # no provider reads what is nested a thousand deep
    except (ValueError, TypeError):
        pass
    try:  # lone surrogates, which msgspec refuses
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (RecursionError, ValueError, TypeError):
        return ""


@lru_cache(maxsize=1024)
def _vocabulary(model: str) -> str:
    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return _DEFAULT
    return _CARRIED.get(name, _STAND_IN)
