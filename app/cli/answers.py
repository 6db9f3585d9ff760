"""Writing answers to a file: in the order of the input, with the input's columns kept.

CSV      the input's columns and ``answer``, ``error``
jsonl    ``{"row", "custom_id", "answer", "response", "error"}``, one line per row
openai   the lines of an OpenAI batch's output and error files, together

A file appears whole or not at all: it is written beside its place and renamed.
"""

import contextlib
import csv
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Final

import msgspec

from app.errors import SluiceError, UsageError
from app.inputs import Input, Row, json_body
from app.items import Result
from app.replies import answer_text

_OPEN: Final = frozenset({"pending", "running"})
_GOOD: Final = range(200, 300)


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a file of answers holds. ``reasons`` counts failed rows by what they say."""

    rows: int = 0
    answered: int = 0
    failed: int = 0
    unanswered: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    samples: list[tuple[Row, str]] = field(default_factory=list[tuple[Row, str]])


def default_output(given: Input) -> Path:
    """``questions.answers.csv`` in the current directory."""
    suffix = ".csv" if given.format == "csv" else ".jsonl"
    return Path(f"{given.path.stem}.answers{suffix}")


def usable_output(output: Path, given: Input) -> Path:
    """Where to write, links resolved. Raises UsageError now rather than after the work."""
    target = output.expanduser().resolve()
    if target == given.path.resolve():
        raise UsageError(f"--output {output} is the input itself; choose another file.")
    if target.is_dir():
        raise UsageError(f"--output {output} is a directory; name a file in it.")
    if target.exists() and not target.is_file():
        raise UsageError(f"--output {output} is not a regular file; name one.")
    if not target.parent.is_dir():
        raise UsageError(f"--output {output}: there is no directory {target.parent}; create it.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: {target.parent} is not writable; choose another.")
    return target


async def write_answers(
    given: Input,
    output: Path,
    results: AsyncIterator[Result],
    *,
    most: int | None,
    remedy: str,
    samples: int = 0,
) -> Tally:
    """Write the first ``most`` rows with their results, which come in the same order.

    Rows beyond the last result are written as not answered. ``remedy`` ends the sentence about a
    file that cannot be written. The first ``samples`` answers are handed back too.
    """
    tally = Tally()
    with whole_file(output, remedy) as file:
        write = _writer(given, file)
        for row in islice(given.rows(), most):
            result = await anext(results, None)
            answer = _count(tally, given, result)
            if answer is not None and len(tally.samples) < samples:
                tally.samples.append((row, answer))
            write(row, result, answer)
    return tally


def _count(tally: Tally, given: Input, result: Result | None) -> str | None:
    """The row's answer, if it has one."""
    tally.rows += 1
    if result is None or result.status in _OPEN:
        tally.unanswered += 1
        return None
    if result.status == "completed":
        tally.answered += 1
        return answer_text(given.endpoint, result.response)
    tally.failed += 1
    tally.reasons[reason(result)] += 1
    return None


def reason(result: Result | None) -> str:
    """Why a row has no answer, for a person."""
    if result is None or result.status in _OPEN:
        return "not answered yet: run the same command to go on"
    if result.status == "cancelled":
        return "cancelled"
    return f"{result.error_code}: {result.error_message or 'no reason was given'}"


@contextlib.contextmanager
def whole_file(output: Path, remedy: str) -> Generator[TextIOWrapper]:
    """A text file that takes its place when it is complete."""
    draft = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        # Not newline translation: csv and JSON lines write their own. What UTF-8 cannot hold
        # (a lone surrogate in an answer) becomes "?" rather than a file that nobody can read.
        with draft.open("w", encoding="utf-8", errors="replace", newline="") as file:
            assert isinstance(file, TextIOWrapper)
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(output)
    except OSError as error:
        raise SluiceError(f"{output} cannot be written: {error.strerror}. {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


_Write = Callable[[Row, Result | None, str | None], None]


def _writer(given: Input, file: IO[str]) -> _Write:
    match given.format:
        case "csv":
            return _csv_writer(given, file)
        case "jsonl":
            return _jsonl_writer(file)
        case "openai":
            return _openai_writer(file)


def _csv_writer(given: Input, file: IO[str]) -> _Write:
    # "\r\n" of RFC 4180: with another end of line Python does not quote a lone carriage return.
    writer = csv.writer(file, delimiter=given.delimiter, lineterminator="\r\n")
    writer.writerow([*given.columns, _free("answer", given.columns), _free("error", given.columns)])

    def write(row: Row, result: Result | None, answer: str | None) -> None:
        error = "" if answer is not None else reason(result)
        writer.writerow([*(row.columns or ()), answer or "", error])

    return write


def _free(name: str, taken: tuple[str, ...]) -> str:
    """The name, or with a number where the input has such a column already."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _jsonl_writer(file: IO[str]) -> _Write:
    def write(row: Row, result: Result | None, answer: str | None) -> None:
        line: dict[str, object] = {"row": row.number}
        if row.custom_id is not None:
            line["custom_id"] = row.custom_id
        line["answer"] = answer
        line["response"] = _verbatim(result.response if result else None)
        line["error"] = None if answer is not None else _error(result)
        _write_line(file, line)

    return write


def _openai_writer(file: IO[str]) -> _Write:
    def write(row: Row, result: Result | None, answer: str | None) -> None:
        response: dict[str, object] | None = None
        refused = False
        if result is not None and result.response is not None and result.status_code is not None:
            response = {
                "status_code": result.status_code,
                "request_id": result.request_id or "",
                "body": _verbatim(result.response),
            }
            # The response alone tells of an HTTP error; an unusable answer needs its reason too.
            refused = result.status == "failed" and result.status_code not in _GOOD
        line: dict[str, object] = {
            "id": f"batch_req_{row.number}",
            "custom_id": row.custom_id,
            "response": response,
            "error": None if refused or answer is not None else _error(result),
        }
        _write_line(file, line)

    return write


def _error(result: Result | None) -> dict[str, str]:
    code = "not_answered"
    if result is not None and result.status == "cancelled":
        code = "batch_cancelled"
    elif result is not None and result.status == "failed":
        code = result.error_code or "failed"
    message = result.error_message if result is not None and result.error_message else None
    return {"code": code, "message": message or reason(result)}


def _verbatim(text: str | None) -> object:
    """JSON as it came, on one line: a line break in JSON is only ever between its tokens."""
    if text is None:
        return None
    return msgspec.Raw(text.replace("\r", " ").replace("\n", " ").encode("utf-8", "surrogatepass"))


def _write_line(file: IO[str], line: dict[str, object]) -> None:
    file.write(json_body(line).decode("utf-8", "replace") + "\n")
