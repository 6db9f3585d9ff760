"""The input files of ``sluice run``: CSV with a prompt template, JSON lines, OpenAI's batch format.

A file is read as a stream, once per call of `Input.rows`, so it may be larger than memory. The
first thing wrong in it raises `InputError` with file, line and remedy, and never its content:
messages are logged, and the content is somebody's prompt.

CSV
    UTF-8 with or without a byte order mark. The header names the columns. The delimiter is a
    comma where the header has one outside quotes, else a semicolon, else a tab. Values arrive in
    the prompt exactly as they are; quoted ones may span lines. Lines that are entirely empty are
    skipped: a single empty value is written ``""``.
JSON lines
    Each line is the body of a request and is sent as it is, byte for byte.
OpenAI batch format
    Each line has ``custom_id``, ``method``, ``url`` and ``body``; the body is sent as it is.

Parameters given beside the file (temperature, max_tokens) override what a line says, as flags do.
"""

import codecs
import csv
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeGuard, assert_never

import msgspec

from app.errors import InputError

Format = Literal["csv", "jsonl", "openai"]

MAX_LINE_BYTES: Final = 100_000_000
MAX_FIELD_CHARACTERS: Final = 10_000_000

_CHAT: Final = "/v1/chat/completions"
_RESPONSES: Final = "/v1/responses"
_COMPLETIONS: Final = "/v1/completions"
NEEDS: Final[dict[str, tuple[str, ...]]] = {
    _CHAT: ("messages",),
    _RESPONSES: ("input", "prompt", "conversation", "previous_response_id"),
    _COMPLETIONS: ("prompt",),
    "/v1/embeddings": ("input",),
    "/v1/moderations": ("input",),
}
"""Each endpoint with the fields of which a body needs one."""
_INFERRED: Final = {"messages": _CHAT, "input": _RESPONSES, "prompt": _COMPLETIONS}
_DELIMITERS: Final = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
_MAGIC: Final = {
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook; save the sheet as CSV in UTF-8",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"PAR1": "is a Parquet file; convert it to CSV or JSON lines",
    codecs.BOM_UTF16_LE: "is encoded in UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is encoded in UTF-16; save it as UTF-8",
}
_BRACES: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")
"""What Postgres cannot keep in a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request of a file.

    ``number`` counts the rows from 1; ``line`` is where the row begins in the file, from 1.
    ``body`` is a JSON object: from CSV it has no model, otherwise it is what the line holds,
    a model included. ``columns`` are a CSV row's own values, in the order of `Input.columns`.
    """

    number: int
    line: int
    body: bytes
    custom_id: str | None
    columns: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file and how to read it; made by `open_input`. ``columns`` is empty unless it is CSV."""

    path: Path
    format: Format
    columns: tuple[str, ...]
    endpoint: str
    prompt: str | None
    system: str | None
    params: Mapping[str, object]
    delimiter: str

    def rows(self) -> Iterator[Row]:
        """Read the file from its beginning; raises `InputError` at the first thing wrong."""
        match self.format:
            case "csv":
                return _csv_rows(self)
            case "jsonl":
                return _jsonl_rows(self)
            case "openai":
                return _openai_rows(self)
            case _:
                assert_never(self.format)


def open_input(
    path: str | Path,
    *,
    prompt: str | None,
    system: str | None,
    format: Format | Literal["auto"],  # noqa: A002 -- the flag's name
    params: Mapping[str, object],
    endpoint: str | None,
) -> Input:
    """Decide how to read a file and read it up to its first row; raises `InputError`.

    ``endpoint`` None means: what the first line says (``messages``: chat, ``input``: responses,
    ``prompt``: completions), and chat for CSV. ``system`` is sent as it is; only ``prompt`` has
    placeholders.
    """
    file = Path(path)
    start = _start(file)
    if endpoint is not None and endpoint not in NEEDS:
        raise InputError(f"--endpoint '{endpoint}' is not one of {', '.join(NEEDS)}")
    if params.get("stream"):
        raise InputError("the parameter stream cannot be used: a batch's answers are not streamed")
    found = _format(file, start) if format == "auto" else format
    if found == "csv":
        opened = _open_csv(file, prompt=prompt, system=system, params=params, endpoint=endpoint)
    else:
        if prompt is not None or system is not None:
            flag = "--system" if prompt is None else "--prompt"
            raise InputError(
                f"{flag} is for CSV files; {file} holds whole requests, so leave it out"
                " (or say --format csv)"
            )
        opened = Input(
            path=file,
            format=found,
            columns=(),
            endpoint=_endpoint(file, found, endpoint),
            prompt=None,
            system=None,
            params=params,
            delimiter="",
        )
    if next(opened.rows(), None) is None:
        raise _no_rows(file)
    return opened


def digest(input: Input, *, model: str, base_url: str) -> str:  # noqa: A002 -- the noun it digests
    """SHA-256, in hex, of everything that decides what would be sent, and to whom.

    Every field is preceded by its length, so no two different inputs run into each other.
    """
    try:
        with input.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(input.path, error) from error
    params = json.dumps(input.params, sort_keys=True, separators=(",", ":"))
    fields = (
        "sluice run 1",
        input.format,
        input.delimiter,
        input.prompt,
        input.system,
        params,
        input.endpoint,
        model,
        base_url,
    )
    whole = hashlib.sha256(content)
    for one in fields:
        data = b"" if one is None else one.encode("utf-8", "surrogatepass")
        length = -1 if one is None else len(data)
        whole.update(length.to_bytes(8, "big", signed=True) + data)
    return whole.hexdigest()


def json_body(fields: Mapping[str, object]) -> bytes:
    """A JSON object from fields that may be `msgspec.Raw`; takes any str.

    Lone surrogates, which are not text but do occur (in arguments of a command line that were not
    UTF-8, in escapes of JSON), become escapes: always valid JSON.
    """
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError:
        return json.dumps(fields, separators=(",", ":"), default=_plain).encode("ascii")


def _plain(value: object) -> object:
    if isinstance(value, msgspec.Raw):
        return json.loads(bytes(value))
    raise TypeError(f"{type(value).__name__} is not JSON")


# --- files and lines ------------------------------------------------------------------------


def _start(file: Path) -> bytes:
    """The first bytes of a file that can be read as often as needed and is text."""
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{file} is a directory; name a file in it")
        if not stat.S_ISREG(mode):
            raise InputError(f"{file} is not a regular file; it is read twice, so save it first")
        with file.open("rb") as reading:
            start = reading.read(4096)
    except OSError as error:
        raise _unreadable(file, error) from error
    for magic, remedy in _MAGIC.items():
        if start.startswith(magic):
            raise InputError(f"{file} {remedy}")
    return start.removeprefix(codecs.BOM_UTF8)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1, without its byte order mark."""
    try:
        with file.open("rb") as reading:
            number = 0
            while line := reading.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{file} line {number} is longer than {MAX_LINE_BYTES // 1_000_000} MB;"
                        " is it the right file? Each request has a line of its own"
                    )
                yield number, line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _unreadable(file, error) from error


def _decoded(file: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} line {number} is not UTF-8 (byte {error.start + 1} of the line is"
            f" 0x{line[error.start]:02x}); save the file as UTF-8"
        ) from None


def _unreadable(file: Path, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{file} does not exist")
    return InputError(f"{file} cannot be read: {error.strerror}")


def _no_rows(file: Path) -> InputError:
    return InputError(f"{file} has no rows; there is nothing to run")


def _format(file: Path, start: bytes) -> Format:
    """CSV by its name; otherwise by the first character, and the fields of the first line."""
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv"
    text = start.lstrip()
    if text.startswith(b"[") and suffix == ".json":
        raise InputError(
            f"{file} is one JSON array; write each request on a line: jq -c '.[]' {file}"
        )
    if not text.startswith(b"{") and suffix not in (".json", ".jsonl", ".ndjson"):
        return "csv"
    _, _, fields = _first(file)
    return "openai" if "body" in fields and ("custom_id" in fields or "url" in fields) else "jsonl"


# --- CSV ------------------------------------------------------------------------------------


def _open_csv(
    file: Path,
    *,
    prompt: str | None,
    system: str | None,
    params: Mapping[str, object],
    endpoint: str | None,
) -> Input:
    delimiter = _delimiter(file)
    _, header = next(_records(file, delimiter), (0, None))
    if header is None:
        raise _no_rows(file)
    columns = tuple(header)
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"{file} has two columns named '{name}'; rename one in its header")
    if prompt is None:
        raise InputError(
            f"{file} is CSV: say what to ask with --prompt, as in --prompt 'Answer:"
            f" {{{columns[0]}}}'; it has: {_listed(columns)}"
        )
    path = endpoint or _CHAT
    if system is not None and path not in (_CHAT, _RESPONSES):
        raise InputError(f"--system cannot be used with {path}, which takes no instructions")
    _ = _template(file, prompt, columns)
    return Input(
        path=file,
        format="csv",
        columns=columns,
        endpoint=path,
        prompt=prompt,
        system=system,
        params=params,
        delimiter=delimiter,
    )


def _csv_rows(given: Input) -> Iterator[Row]:
    template = _template(given.path, given.prompt or "", given.columns)
    records = _records(given.path, given.delimiter)
    _ = next(records, None)
    width = len(given.columns)
    for number, (line, values) in enumerate(records, start=1):
        if len(values) != width:
            raise InputError(
                f"{given.path} line {line} has {len(values)} values where the header names"
                f" {width} columns; quote values that hold {_DELIMITERS[given.delimiter]}, a"
                " quote or a line break"
            )
        text = "".join(part if isinstance(part, str) else values[part] for part in template)
        body = json_body({**_asked(given.endpoint, given.system, text), **given.params})
        yield Row(number=number, line=line, body=body, custom_id=None, columns=tuple(values))


def _asked(endpoint: str, system: str | None, text: str) -> dict[str, object]:
    """The body that asks ``text`` of an endpoint."""
    if endpoint == _CHAT:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return {"messages": messages}
    if endpoint == _RESPONSES and system is not None:
        return {"instructions": system, "input": text}
    return {"prompt" if endpoint == _COMPLETIONS else "input": text}


def _delimiter(file: Path) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    for delimiter in _DELIMITERS:
        try:
            _, header = next(_records(file, delimiter), (0, None))
        except InputError:
            continue  # what is quoted for one delimiter may be broken for another
        if header is not None and len(header) > 1:
            return delimiter
    return ","


def _records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file, its header included, each with the line where it begins."""
    _ = csv.field_size_limit(MAX_FIELD_CHARACTERS)
    # Lines end at \n only and keep their ending, which is what newline="" means for csv: a
    # carriage return inside quotes is part of the value.
    text = (_decoded(file, number, line) for number, line in _lines(file))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{file} line {line} is not valid CSV: {_reason(error)}") from None
        if record:
            yield line, record


def _reason(error: csv.Error) -> str:
    message = str(error)
    if "unexpected end of data" in message:
        return "a quote that opens there is never closed; write quotes inside a value twice"
    if "field larger" in message:
        return (
            f"a value is longer than {MAX_FIELD_CHARACTERS // 1_000_000} million characters;"
            " perhaps a quote that opens there is never closed"
        )
    if "expected after" in message:
        return "text follows a closing quote; write quotes inside a value twice"
    if "new-line" in message:
        return "it ends lines with a carriage return alone; save it with line feeds"
    return message


def _template(file: Path, prompt: str, columns: Sequence[str]) -> list[str | int]:
    """The prompt in parts: text, or the number of the column whose value goes there.

    Placeholders name a column and nothing else: no attributes, no formats, and what a value
    brings along is never looked at again.
    """
    parts: list[str | int] = []
    end = 0
    for brace in _BRACES.finditer(prompt):
        parts.append(prompt[end : brace.start()])
        end = brace.end()
        found, name = brace.group(), brace.group(1)
        if found in ("{{", "}}"):
            parts.append(found[0])
        elif name is None:
            raise InputError(
                f"--prompt has a single '{found}' at character {brace.start() + 1}; write"
                f" {found * 2} for a brace that is text, {{name}} for a column"
            )
        elif name in columns:
            parts.append(columns.index(name))
        else:
            hint = "" if name.isidentifier() else "; write {{ and }} for braces that are text"
            raise InputError(
                f"column '{name}' in --prompt is not in {file}; it has: {_listed(columns)}{hint}"
            )
    parts.append(prompt[end:])
    return [part for part in parts if part != ""]


def _listed(columns: Sequence[str]) -> str:
    """Names as they are, in quotes where spaces around one would not be seen."""
    return ", ".join(name if name and name == name.strip() else repr(name) for name in columns)


# --- JSON lines and OpenAI's batch format ---------------------------------------------------


def _requests(file: Path) -> Iterator[tuple[int, bytes, dict[str, object]]]:
    """Each line that is not blank: its number, its bytes and the fields of its object."""
    for number, line in _lines(file):
        data = line.strip()
        if data:
            yield number, data, fields_of(f"{file} line {number}", _checked(file, number, data))


def _checked(file: Path, number: int, line: bytes) -> bytes:
    _ = _decoded(file, number, line)  # msgspec skips over the inside of strings
    return line


def fields_of(place: str, data: bytes) -> dict[str, object]:
    """The fields of a JSON object, each as `msgspec.Raw`: nested values are not touched.

    An object with lone surrogates, which msgspec refuses and providers take, comes decoded.
    """
    try:
        return dict(msgspec.json.decode(data, type=dict[str, msgspec.Raw]))
    except msgspec.ValidationError:
        raise InputError(f"{place} is not a JSON object; each line is one request") from None
    except RecursionError:
        raise InputError(f"{place} is not valid JSON: it is nested too deeply") from None
    except msgspec.DecodeError:
        pass
    try:
        decoded: object = json.loads(data, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # NaN, or a number of thousands of digits
        reason = str(error)
    else:
        if _is_object(decoded):
            return decoded
        reason = "it is not an object"
    raise InputError(f"{place} is not valid JSON: {reason}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _is_object(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)


def value_of(raw: object) -> object:
    """A field of ``fields_of``, decoded."""
    return msgspec.json.decode(raw) if isinstance(raw, msgspec.Raw) else raw


def _first(file: Path) -> tuple[int, bytes, dict[str, object]]:
    first = next(_requests(file), None)
    if first is None:
        raise _no_rows(file)
    return first


def _endpoint(file: Path, format: Format, given: str | None) -> str:  # noqa: A002
    """The endpoint of a file: what is given, else what its first line says."""
    number, _, fields = _first(file)
    if format == "openai":
        url = _url(f"{file} line {number}", fields)
        if given not in (None, url):
            raise InputError(f"{file} line {number} has the url '{url}', not --endpoint {given}")
        return url
    if given is not None:
        return given
    for name, endpoint in _INFERRED.items():
        if name in fields:
            return endpoint
    raise InputError(
        f"{file} line {number} has none of {', '.join(_INFERRED)}: it is not a request that"
        " can be recognised; say which with --endpoint"
    )


def _url(place: str, fields: Mapping[str, object]) -> str:
    url = _text(place, fields, "url")
    if url not in NEEDS:
        raise InputError(f"{place} has an unsupported url; it must be one of {', '.join(NEEDS)}")
    return url


def _jsonl_rows(given: Input) -> Iterator[Row]:
    for number, (line, data, fields) in enumerate(_requests(given.path), start=1):
        body = _body(f"{given.path} line {line}", data, fields, given)
        yield Row(number=number, line=line, body=body, custom_id=None, columns=None)


def _openai_rows(given: Input) -> Iterator[Row]:
    # 16 bytes of digest each, however long the ids: about 130 MB for a million rows, and two
    # ids that differ collide once in 10^26 such files.
    seen: set[bytes] = set()
    for number, (line, _, fields) in enumerate(_requests(given.path), start=1):
        place = f"{given.path} line {line}"
        custom_id = _text(place, fields, "custom_id")
        key = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if key in seen:
            raise InputError(
                f"{place} repeats the custom_id '{custom_id[:100]}'; each must be unique"
            )
        seen.add(key)
        if _text(place, fields, "method") != "POST":
            raise InputError(f"{place} has a method other than POST")
        if _url(place, fields) != given.endpoint:
            raise InputError(
                f"{place} has another url than the lines before ({given.endpoint}); split the"
                " file by url"
            )
        raw = fields.get("body")
        if raw is None:
            raise InputError(f"{place} has no body")
        data = bytes(raw) if isinstance(raw, msgspec.Raw) else encoded(place, raw)
        body = _body(place, data, fields_of(f"{place}, its body,", data), given)
        yield Row(number=number, line=line, body=body, custom_id=custom_id, columns=None)


def encoded(place: str, value: object) -> bytes:
    """JSON of a decoded value, in ASCII."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    except ValueError:  # 1e999, which is decoded as infinity
        raise InputError(f"{place} has a number that is too large") from None


def _body(place: str, data: bytes, fields: Mapping[str, object], given: Input) -> bytes:
    """The body to send: ``data`` itself unless there are parameters to set in it."""
    needed = NEEDS[given.endpoint]
    if not any(name in fields for name in needed):
        raise InputError(f"{place} has no {needed[0]}, which {given.endpoint} needs")
    if "stream" in fields and value_of(fields["stream"]):
        raise InputError(f"{place} asks for a stream; a batch's answers are not: remove stream")
    return json_body({**fields, **given.params}) if given.params else data


def _text(place: str, fields: Mapping[str, object], name: str) -> str:
    if name not in fields:
        raise InputError(f"{place} has no {name}")
    value = value_of(fields[name])
    if not isinstance(value, str) or not value or UNSTORABLE.search(value):
        raise InputError(f"{place} has a {name} that is not a text that can be stored")
    return value
