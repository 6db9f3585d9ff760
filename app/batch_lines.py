"""The lines of a file that a batch is made from: cut out of pieces, and checked one by one.

A line is ``{"custom_id", "method": "POST", "url", "body"}``. Knows neither HTTP nor Postgres; runs
in worker threads, a piece at a time, in memory for one piece and the longest line. What is wrong
is a `LineError` with the line's number (from 1), OpenAI's code where it has one, a sentence and the
parameter; it quotes no content but the ``custom_id`` that comes twice.
"""

import codecs
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from app import inputs
from app.errors import InputError

MOST_CUSTOM_ID: Final = 512
_MOST_MODEL: Final = 200
_SLACK: Final = 64 * 1024  # of a line beside its body


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a line; ``line`` None: with the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A valid line. ``body`` is the request to the letter."""

    number: int
    custom_id: str
    model: str
    body: bytes


class BatchLines:
    """Takes the pieces of a file in order; gives its lines, valid or not."""

    def __init__(self, endpoint: str, *, most_item_bytes: int) -> None:
        self._endpoint = endpoint
        self._most_bytes = most_item_bytes + _SLACK
        self._waiting = b""
        self._number = 0
        self._is_skipping = False
        # 16 bytes of digest each, however long the ids; two that differ collide once in 10^26 files.
        self._seen: set[bytes] = set()

    def feed(self, piece: bytes) -> list[Line | LineError]:
        """The lines that end in this piece."""
        *lines, rest = (self._waiting + piece).split(b"\n")
        self._waiting = rest
        found = [each for line in lines for each in self._line(line)]
        if len(self._waiting) > self._most_bytes:
            # What follows up to the next line break belongs to it.
            self._waiting = b""
            self._is_skipping = True
        return found

    def end(self) -> list[Line | LineError]:
        """The last line, if the file does not end with a line break."""
        waiting, self._waiting = self._waiting, b""
        return list(self._line(waiting)) if waiting or self._is_skipping else []

    def _line(self, raw: bytes) -> Iterator[Line | LineError]:
        self._number += 1
        if self._number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if self._is_skipping or len(raw) > self._most_bytes:
            self._is_skipping = False
            yield LineError(
                line=self._number,
                code="line_too_long",
                message=f"The line is longer than {self._most_bytes:,} bytes "
                "(SLUICE_MAX_ITEM_BYTES and 64 KiB).",
            )
            return
        raw = raw.strip()
        if not raw:
            return
        try:
            yield self._checked(raw)
        except _WrongError as wrong:
            yield LineError(
                line=self._number, code=wrong.code, message=str(wrong), param=wrong.param
            )

    def _checked(self, raw: bytes) -> Line:
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise _WrongError(
                f"The line is not UTF-8: byte {error.start + 1} of it is 0x{raw[error.start]:02x}.",
                code="invalid_json_line",
            ) from None
        try:
            fields = inputs.fields_of("The line", raw)
            custom_id = self._custom_id(fields)
            self._method_and_url(fields)
            body, members = self._body(fields)
        except InputError as error:
            raise _WrongError(f"{error}.", code="invalid_json_line") from None
        return Line(number=self._number, custom_id=custom_id, model=self._model(members), body=body)

    def _custom_id(self, fields: Mapping[str, object]) -> str:
        custom_id = _text(fields, "custom_id")
        if len(custom_id) > MOST_CUSTOM_ID or inputs.UNSTORABLE.search(custom_id):
            raise _WrongError(
                f"custom_id must have at most {MOST_CUSTOM_ID} characters, and none that cannot be "
                "stored (NUL, half of a surrogate pair).",
                code="invalid_custom_id",
                param="custom_id",
            )
        key = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if key in self._seen:
            raise _WrongError(
                f"The custom_id '{custom_id[:100]}' is used by an earlier line; each must be unique.",
                code="duplicate_custom_id",
                param="custom_id",
            )
        self._seen.add(key)
        return custom_id

    def _method_and_url(self, fields: Mapping[str, object]) -> None:
        if _text(fields, "method") != "POST":
            raise _WrongError("method must be POST.", code="invalid_method", param="method")
        if _text(fields, "url") != self._endpoint:
            raise _WrongError(
                f"url must be the batch's endpoint, {self._endpoint}.",
                code="invalid_url",
                param="url",
            )

    def _body(self, fields: Mapping[str, object]) -> tuple[bytes, dict[str, object]]:
        raw = fields.get("body")
        body = bytes(raw) if isinstance(raw, msgspec.Raw) else inputs.encoded("The line", raw)
        if body == b"null":
            raise _missing("body")
        try:
            members = inputs.fields_of("The body", body)
        except InputError:
            raise _WrongError(
                "body must be a JSON object.", code="invalid_request", param="body"
            ) from None
        needed = inputs.NEEDS[self._endpoint]
        if not any(name in members for name in needed):
            raise _missing(f"body.{needed[0]}")
        if "stream" in members and inputs.value_of(members["stream"]):
            raise _WrongError(
                "A batch's answers are not streamed; remove stream from the body.",
                code="invalid_request",
                param="body.stream",
            )
        return body, members

    def _model(self, members: Mapping[str, object]) -> str:
        model = inputs.value_of(members.get("model"))
        if model is None:
            raise _missing("body.model")
        if not isinstance(model, str) or not 0 < len(model) <= _MOST_MODEL:
            raise _WrongError(
                f"model must be a text of 1 to {_MOST_MODEL} characters.",
                code="invalid_request",
                param="body.model",
            )
        if inputs.UNSTORABLE.search(model):
            raise _WrongError("There is no such model.", code="model_not_found", param="body.model")
        return model


class _WrongError(Exception):
    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def _missing(param: str) -> _WrongError:
    return _WrongError(
        f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param
    )


def _text(fields: Mapping[str, object], name: str) -> str:
    value = inputs.value_of(fields.get(name))
    if value is None:
        raise _missing(name)
    if not isinstance(value, str) or not value:
        raise _WrongError(f"{name} must be a text.", code=f"invalid_{name}", param=name)
    return value
