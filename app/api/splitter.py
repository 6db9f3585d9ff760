"""Takes a JSON object of any size apart without holding it: members, and the elements of one array.

A batch's body may be a hundred megabytes, nearly all of it the array ``items``. So the text is
scanned piece by piece with regular expressions that only know strings and brackets, at C speed;
each member and each element comes out as a raw slice. Whoever decodes a slice learns whether it is
JSON: here only its extent is found, and the grammar between slices is checked.

Nested values are matched by one expression up to ``_NESTED`` brackets deep (about 9 microseconds per
600 bytes); what is deeper, or broken off where the buffer ends, is measured token by token. The
expressions are possessive, so no text makes them backtrack.

Whoever gives a decoder of arrays gets stretches of elements decoded at once, several times as fast. The
elements of a batch begin alike, so the last place in the buffer that looks like the seam between the
first two probably is one, and the decoder is the proof: what it takes for an array ends between two elements.
What it does not take comes one by one, as without it; whatever is wrong is found and named there.
"""

import codecs
import re
from collections.abc import Callable, Iterator
from typing import Final, TypeVar, overload

import msgspec

_NESTED: Final = 6
_DEEPEST: Final = 2000  # far below where a decoder's recursion ends
STEP: Final = 1024 * 1024

_STRING: Final = rb'"(?:[^"\\]++|\\.)*+"'


def _nested(depth: int) -> bytes:
    flat = rb'[^][{}"]++|' + _STRING
    inner = flat
    for _ in range(depth):
        inner = flat + rb"|[\[{](?:" + inner + rb")*+[\]}]"
    return rb"[\[{](?:" + inner + rb")*+[\]}]"


_SPACE_RE: Final = re.compile(rb"[ \t\n\r]*+")
_STRING_RE: Final = re.compile(_STRING, re.DOTALL)
_NESTED_RE: Final = re.compile(_nested(_NESTED), re.DOTALL)
_SCALAR_RE: Final = re.compile(rb"[A-Za-z0-9.+-]++")
_TOKEN_RE: Final = re.compile(_STRING + rb'|[][{}"]', re.DOTALL)

_SEAM: Final = 10  # bytes of an element that its seam shows: a bracket, and most of a name

T = TypeVar("T")

_QUOTE: Final = ord('"')
_OPENING: Final = b"{["


class MalformedError(ValueError):
    """The text is not a JSON object; says where and why."""


class TooLongError(ValueError):
    """A value is longer than its kind may be. ``index`` is the element's, None for a member."""

    def __init__(self, key: str, index: int | None, most: int) -> None:
        super().__init__(f"is larger than {most:,} bytes")
        self.key = key
        self.index = index
        self.most = most


class Splitter:
    """Reads ``read(size)`` until it returns nothing, from wherever it stands.

    ``members`` walks the whole object and remembers where the array's elements begin
    (``elements_at``, in bytes from where it stood; None: no such member); ``elements`` then walks
    just those, on a splitter whose source stands there.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        *,
        array: str,
        most_element: int,
        most_member: int = STEP,
        step: int = STEP,
    ) -> None:
        self._read = read
        self._array = array
        self._most_element = most_element
        self._most_member = most_member
        self._step = step
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._buffer = b""
        self._at = 0
        self._before = 0  # bytes that left the buffer
        self._ended = False
        self._one_by_one_to = 0
        self.elements_at: int | None = None

    @overload
    def members(self) -> Iterator[tuple[str, bytes]]: ...
    @overload
    def members(
        self, decode: Callable[[bytes], list[T]]
    ) -> Iterator[tuple[str, bytes | list[T]]]: ...
    def members(
        self, decode: Callable[[bytes], list[T]] | None = None
    ) -> Iterator[tuple[str, bytes | list[T]]]:
        """Every member's name and raw value; the array's elements one by one under its name.

        ``decode``: as of ``elements``. Raises MalformedError and TooLongError. A name that comes twice is
        refused: which one counts would depend on the reader.
        """
        self._skip_mark()
        if self._peek() != ord("{"):
            raise self._malformed("expected an object")
        self._at += 1
        seen: set[str] = set()
        ended = self._peek() == ord("}")
        self._at += ended
        while not ended:
            key = self._key()
            if key in seen:
                raise self._malformed(f"the member '{key[:100]}' comes twice")
            seen.add(key)
            if key == self._array and self._peek() == ord("["):
                self._at += 1
                self.elements_at = self._before + self._at
                for element in self._elements(decode):
                    yield key, element
            else:
                yield key, self._value(key, None, self._most_member)
            ended = self._separator(ord("}"), "} or ,")
        if self._peek() is not None:
            raise self._malformed("there is more after the object")

    @overload
    def elements(self) -> Iterator[bytes]: ...
    @overload
    def elements(self, decode: Callable[[bytes], list[T]]) -> Iterator[bytes | list[T]]: ...
    def elements(
        self, decode: Callable[[bytes], list[T]] | None = None
    ) -> Iterator[bytes | list[T]]:
        """The raw elements of an array whose opening bracket has been passed.

        ``decode`` makes a list of an array, or raises an exception of msgspec's; with it, elements may also
        come as such lists.
        """
        return self._elements(decode)

    def _elements(self, decode: Callable[[bytes], list[T]] | None) -> Iterator[bytes | list[T]]:
        index = 0
        if self._peek() == ord("]"):
            self._at += 1
            return
        seam = b""
        while True:
            if seam and decode is not None:
                some = self._stretch(seam, decode)
                if some:
                    yield some
                    index += len(some)
                    self._separator(ord("]"), "] or ,")
            yield self._value(self._array, index, self._most_element)
            index += 1
            end = self._before + self._at
            if self._separator(ord("]"), "] or ,"):
                return
            if not seam and self._peek() is not None and end >= self._before:
                seam = self._buffer[end - self._before : self._at + _SEAM]

    def _stretch(self, seam: bytes, decode: Callable[[bytes], list[T]]) -> list[T] | None:
        """Pass all elements up to the last seam in the buffer, decoded; None: one by one."""
        _ = self._peek()
        if self._before + self._at < self._one_by_one_to:
            return None
        end = self._buffer.rfind(seam, self._at)
        if self._at < end <= self._at + self._most_element:
            try:
                some = decode(b"[%b]" % self._buffer[self._at : end])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass
            else:
                self._at = end
                return some
        self._one_by_one_to = self._before + len(self._buffer)
        return None

    def _skip_mark(self) -> None:
        """Pass a byte order mark, which some editors put before UTF-8."""
        while len(self._buffer) < len(codecs.BOM_UTF8) and self._more():
            pass
        if self._buffer.startswith(codecs.BOM_UTF8):
            self._at = len(codecs.BOM_UTF8)

    def _key(self) -> str:
        if self._peek() != _QUOTE:
            raise self._malformed("expected a member's name in quotes")
        try:
            key = msgspec.json.decode(self._value("", None, self._most_member), type=str)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._malformed("a member's name cannot be read") from None
        if self._peek() != ord(":"):
            raise self._malformed("expected :")
        self._at += 1
        return key

    def _separator(self, closing: int, expected: str) -> bool:
        """Pass a comma (False) or the closing bracket (True)."""
        found = self._peek()
        if found not in (closing, ord(",")):
            raise self._malformed(f"expected {expected}")
        self._at += 1
        return found == closing

    def _value(self, key: str, index: int | None, most: int) -> bytes:
        first = self._peek()
        if first is None:
            raise self._malformed("it breaks off")
        nested = first in _OPENING
        pattern = _NESTED_RE if nested else _STRING_RE if first == _QUOTE else _SCALAR_RE
        while True:
            found = pattern.match(self._buffer, self._at)
            end = found.end() if found else self._measured() if nested else None
            if (
                end is not None
                and pattern is _SCALAR_RE
                and end == len(self._buffer)
                and not self._ended
            ):
                end = None  # its rest may still come
            if (len(self._buffer) if end is None else end) - self._at > most:
                raise TooLongError(key, index, most)
            if end is not None:
                value = self._buffer[self._at : end]
                self._at = end
                return value
            if found is None and pattern is _SCALAR_RE:
                raise self._malformed("expected a value")
            if not self._more() and pattern is not _SCALAR_RE:
                raise self._malformed("it breaks off")

    def _measured(self) -> int | None:
        """The end of the nested value at hand, token by token; None: not in the buffer yet."""
        depth = 0
        for token in _TOKEN_RE.finditer(self._buffer, self._at):
            match self._buffer[token.start()]:
                case 0x5B | 0x7B:  # [ {
                    depth += 1
                    if depth > _DEEPEST:
                        raise self._malformed(f"it is nested more than {_DEEPEST} deep")
                case 0x5D | 0x7D:  # ] }
                    depth -= 1
                    if depth == 0:
                        return token.end()
                case _ if token.end() - token.start() == 1:  # a string that goes on
                    return None
                case _:
                    pass
        return None

    def _peek(self) -> int | None:
        """The next byte that is not white space, without passing it; None at the end."""
        while True:
            found = _SPACE_RE.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return None

    def _more(self) -> bool:
        """Read on; at least as much as is waiting, so that a long value is rescanned seldom."""
        if self._ended:
            return False
        waiting = self._buffer[self._at :]
        piece = self._read(max(self._step, len(waiting)))
        try:
            self._utf8.decode(piece, final=not piece)
        except UnicodeDecodeError:
            raise self._malformed("it is not UTF-8") from None
        self._ended = not piece
        self._before += self._at
        self._at = 0
        self._buffer = waiting + piece
        return not self._ended

    def _malformed(self, why: str) -> MalformedError:
        return MalformedError(f"is not valid JSON at byte {self._before + self._at}: {why}")
