"""Input files: what is sent of them, and what a person is told about a wrong one."""

import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import inputs
from app.errors import InputError
from app.inputs import Format, Input, Row, digest, json_body, open_input

CHAT = "/v1/chat/completions"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file, of text or bytes, and return its path."""

    def writing(content: str | bytes, name: str = "in.csv") -> Path:
        file = tmp_path / name
        _ = file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return writing


def opened(
    file: Path,
    prompt: str | None = None,
    *,
    system: str | None = None,
    as_format: Format | None = None,
    params: Mapping[str, object] | None = None,
    endpoint: str | None = None,
) -> Input:
    return open_input(
        file,
        prompt=prompt,
        system=system,
        format=as_format or "auto",
        params=params or {},
        endpoint=endpoint,
    )


def bodies(given: Input) -> list[object]:
    return [json.loads(row.body) for row in given.rows()]


def asks(given: Input) -> list[str]:
    """The prompts of a CSV file's chats."""
    decoded = (msgspec.json.decode(row.body, type=dict[str, object]) for row in given.rows())
    return [
        msgspec.convert(body["messages"], list[dict[str, str]])[-1]["content"] for body in decoded
    ]


def refusal(file: Path, prompt: str | None = None, **options: str) -> str:
    """What is said about a file, whether at its opening or while it is read."""
    with pytest.raises(InputError) as refused:
        for _ in opened(file, prompt, endpoint=options.get("endpoint")).rows():
            pass
    text = str(refused.value)
    assert str(file) in text
    return text.replace(str(file), "FILE")


def lines(*requests: object) -> str:
    return "".join(json.dumps(request) + "\n" for request in requests)


def asked(text: str = "hi") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


def task(custom_id: str, **changes: object) -> dict[str, object]:
    body = {"model": "m", **asked()}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


# --- CSV: what is sent ----------------------------------------------------------------------


def test_a_csv_row_becomes_a_chat(write: Write) -> None:
    file = write("id,text\n1,one\n2,two\n")
    given = opened(file, "Answer: {text}", system="Be {text}.", params={"temperature": 0})
    assert (given.format, given.columns, given.endpoint) == ("csv", ("id", "text"), CHAT)
    first = {
        "messages": [
            {"role": "system", "content": "Be {text}."},
            {"role": "user", "content": "Answer: one"},
        ],
        "temperature": 0,
    }
    rows = list(given.rows())
    assert json.loads(rows[0].body) == first
    body = rows[1].body
    assert rows[1] == Row(number=2, line=3, body=body, custom_id=None, columns=("2", "two"))
    assert list(given.rows()) == rows, "an input can be read again"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/responses", {"input": "one"}),
        ("/v1/embeddings", {"input": "one"}),
        ("/v1/moderations", {"input": "one"}),
        ("/v1/completions", {"prompt": "one"}),
    ],
)
def test_csv_serves_every_endpoint(write: Write, endpoint: str, body: dict[str, str]) -> None:
    file = write("text\none\n")
    assert bodies(opened(file, "{text}", endpoint=endpoint)) == [body]


def test_a_system_prompt_is_the_instructions_of_responses(write: Write) -> None:
    given = opened(write("text\none\n"), "{text}", system="Be brief.", endpoint="/v1/responses")
    assert bodies(given) == [{"instructions": "Be brief.", "input": "one"}]


cells = st.text(st.characters(exclude_categories=("Cs",)))


@given(
    st.lists(cells, min_size=1, max_size=4, unique=True).filter(
        lambda names: not any(set("{}\ufeff") & set(name) for name in names) and names != [""]
    ),
    st.lists(st.lists(cells, min_size=4, max_size=4), min_size=1, max_size=4),
    st.booleans(),
)
def test_any_value_arrives_in_the_prompt_exactly(
    names: list[str],
    values: list[list[str]],
    bom: bool,  # noqa: FBT001 -- hypothesis passes it
) -> None:
    rows = [row[: len(names)] for row in values]
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        _ = file.write((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
        file.flush()
        given = opened(Path(file.name), "<{" + "}|{".join(names) + "}>")
        assert given.columns == tuple(names)
        assert asks(given) == [f"<{'|'.join(row)}>" for row in rows]
        assert [row.columns for row in given.rows()] == [tuple(row) for row in rows]


def test_braces_are_doubled_and_values_are_substituted_once(write: Write) -> None:
    file = write('a,b,a.b,0\n{b},"{{a}}",dotted,zero\n')
    prompt = '{{"x": {a}}} {b} {{{a}}} {a.b} {0}'
    assert asks(opened(file, prompt)) == ['{"x": {b}} {{a}} {{b}} dotted zero']


def test_a_byte_order_mark_is_no_part_of_the_first_column(write: Write) -> None:
    assert opened(write("\ufefftext,id\na,1\n"), "{text}").columns == ("text", "id")


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("a;b\n1;2\n", ("a", "b")),
        ("a\tb\n1\t2\n", ("a", "b")),
        ("a,b;c\n1,2\n", ("a", "b;c")),
        ('"a,b";c\n1;2\n', ("a,b", "c")),
        ('"a";"b"\n1;2\n', ("a", "b")),
        ("a;b\tc\n1;2\n", ("a", "b\tc")),
        ("a b\n1;2\n", ("a b",)),
        ('"a;b"\n1\n', ("a;b",)),
    ],
)
def test_the_header_tells_the_delimiter(
    write: Write, content: str, columns: tuple[str, ...]
) -> None:
    given = opened(write(content), "x")
    assert given.columns == columns
    assert len(list(given.rows())) == 1


def test_a_tsv_file_is_delimited_by_tabs(write: Write) -> None:
    assert opened(write("a,b\tc\nx\ty\n", "in.tsv"), "{c}").columns == ("a,b", "c")


def test_values_may_span_lines_and_errors_name_where_a_row_begins(write: Write) -> None:
    file = write('id,text\r\n1,"two\r\nlines"\r\n\r\n2,x\r\n3\r\n')
    given = opened(file, "{text}")
    rows = given.rows()
    first, second = next(rows), next(rows)
    assert first.columns == ("1", "two\r\nlines")
    assert (first.line, second.line, second.number) == (2, 5, 2)
    with pytest.raises(InputError, match=r"line 6 has 1 values where the header names 2 columns"):
        _ = next(rows)


def test_nul_and_long_values_pass(write: Write) -> None:
    long = "x" * 9_000_000
    assert asks(opened(write(f"a,b\nn\0l,{long}\n"), "{a}")) == ["n\0l"]


def test_a_prompt_that_is_not_text_is_still_valid_json(write: Write) -> None:
    """Arguments of a command line that are not UTF-8 arrive with lone surrogates."""
    given = opened(write("a\nä\n"), "\udcff {a}")
    assert bodies(given) == [{"messages": [{"role": "user", "content": "\udcff ä"}]}]


# --- CSV: what is refused -------------------------------------------------------------------


def test_a_placeholder_names_a_column(write: Write) -> None:
    file = write("a,b, c\n1,2,3\n")
    it_has = "is not in FILE; it has: a, b, ' c'"
    assert refusal(file, "{x}") == f"column 'x' in --prompt {it_has}"
    assert refusal(file, "{a.b}").startswith(f"column 'a.b' in --prompt {it_has}")
    assert "{{ and }} for braces that are text" in refusal(file, '{"a": 1}')


def test_a_single_brace_is_refused(write: Write) -> None:
    file = write("a\n1\n")
    for prompt in ("{a", "a}", "{a}}", "{{a}"):
        with pytest.raises(InputError, match=r"single '[{}]' at character \d"):
            _ = opened(file, prompt)


def test_csv_needs_a_prompt(write: Write) -> None:
    said = refusal(write("id,text\n1,one\n"))
    assert "--prompt 'Answer: {id}'" in said
    assert said.endswith("it has: id, text")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "FILE has no rows"),
        ("\n\n", "FILE has no rows"),
        ("a,b\n", "FILE has no rows"),
        ("a,b,a\n1,2,3\n", "two columns named 'a'"),
        ("a,b\n1,2\n1,2,3\n", "line 3 has 3 values where the header names 2 columns"),
        ('a,b\n1,"2\n3\n', "line 2 is not valid CSV: a quote that opens there is never closed"),
        ('a,b\n1,"2"3\n', "line 2 is not valid CSV: text follows a closing quote"),
        ("a,b\r1,2\r", "line 1 is not valid CSV: it ends lines with a carriage return alone"),
        ("a\n" + "x" * 10_000_001, "line 2 is not valid CSV: a value is longer than 10 million"),
        (b"a\nok\nb\xe4d\n", "line 3 is not UTF-8 (byte 2 of the line is 0xe4)"),
        ("a\nb".encode("utf-16"), "is encoded in UTF-16"),
        (b"PK\x03\x04\x14\0", "is a ZIP archive or an Excel workbook"),
        (b"\x1f\x8b\x08\0", "is compressed with gzip"),
    ],
)
def test_wrong_csv_is_refused(write: Write, content: str | bytes, said: str) -> None:
    assert said in refusal(write(content), "p")


def test_system_prompts_need_an_endpoint_that_takes_them(write: Write) -> None:
    with pytest.raises(InputError, match="--system cannot be used with /v1/embeddings"):
        _ = opened(write("a\n1\n"), "{a}", system="s", endpoint="/v1/embeddings")


# --- JSON lines -----------------------------------------------------------------------------


def test_a_line_is_sent_byte_for_byte(write: Write) -> None:
    one = b'{"messages" : [], "model":"m", "seed": 1.10,"x":"\\ud800 \\u00e4 \xc3\xa4"}'
    two = b'{"messages":[{}],"big":123456789012345678901234567890,"e":1e999}'
    file = write(b"\n  " + one + b" \r\n\n" + two, "in.jsonl")
    given = opened(file)
    assert (given.format, given.endpoint, given.columns) == ("jsonl", CHAT, ())
    assert list(given.rows()) == [
        Row(number=1, line=2, body=one, custom_id=None, columns=None),
        Row(number=2, line=4, body=two, custom_id=None, columns=None),
    ]


@pytest.mark.parametrize(
    ("request_", "endpoint"),
    [
        ({"messages": []}, CHAT),
        ({"input": "x"}, "/v1/responses"),
        ({"prompt": "x"}, "/v1/completions"),
    ],
)
def test_the_first_line_tells_the_endpoint(
    write: Write, request_: dict[str, object], endpoint: str
) -> None:
    assert opened(write(lines(request_), "in.jsonl")).endpoint == endpoint


def test_an_endpoint_that_is_given_wins(write: Write) -> None:
    file = write(lines({"input": "x"}), "in.jsonl")
    assert opened(file, endpoint="/v1/embeddings").endpoint == "/v1/embeddings"


def test_json_is_recognised_whatever_the_name(write: Write) -> None:
    assert opened(write("\ufeff" + lines(asked()), "in.txt")).format == "jsonl"
    assert opened(write("a\nb\n", "in.txt"), "{a}").format == "csv"
    assert opened(write(lines(task("1")), "in")).format == "openai"


def test_params_override_what_a_line_says(write: Write) -> None:
    line = b'{"messages":[{"content":"\\u00e4 1.10"}],"n":2,"top_p":1.0}'
    file = write(line, "in.jsonl")
    (row,) = opened(file, params={"n": 1, "user": "u"}).rows()
    assert row.body == b'{"messages":[{"content":"\\u00e4 1.10"}],"n":1,"top_p":1.0,"user":"u"}'
    file = write(rb'{"messages":[],"x":"\ud800"}', "in.jsonl")
    (row,) = opened(file, params={"n": 1}).rows()
    assert row.body == rb'{"messages":[],"x":"\ud800","n":1}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages":', "line 2 is not valid JSON: Expecting value at column 13"),
        ("nonsense", "line 2 is not valid JSON: Expecting value at column 1"),
        ('{"messages": NaN}', "line 2 is not valid JSON: NaN is not a JSON number"),
        ('{"messages":' + "[" * 100_000, "line 2 is not valid JSON: it is nested too deeply"),
        ("[1]", "line 2 is not a JSON object"),
        ("5", "line 2 is not a JSON object"),
        ('{"a": "\ud800"}', "line 2 is not UTF-8"),
        ('{"input": "x"}', f"line 2 has no messages, which {CHAT} needs"),
        ('{"messages": [], "stream": true}', "line 2 asks for a stream"),
    ],
)
def test_a_wrong_line_is_refused(write: Write, line: str, said: str) -> None:
    content = (lines(asked()) + line + "\n").encode("utf-8", "surrogatepass")
    assert said in refusal(write(content, "in.jsonl"))


def test_a_stream_that_is_not_asked_for_is_no_error(write: Write) -> None:
    assert opened(write(lines({**asked(), "stream": False}), "in.jsonl"))


def test_what_cannot_be_recognised_is_refused(write: Write) -> None:
    assert "say which with --endpoint" in refusal(write('{"a": 1}', "in.jsonl"))
    assert "jq -c" in refusal(write("[{}]", "in.json"))
    assert "FILE has no rows" in refusal(write("\n", "in.jsonl"))


def test_prompts_belong_to_csv(write: Write) -> None:
    file = write(lines(asked()), "in.jsonl")
    with pytest.raises(InputError, match="--prompt is for CSV files"):
        _ = opened(file, "x", system="y")
    with pytest.raises(InputError, match="--system is for CSV files"):
        _ = opened(file, system="y")


def test_an_overlong_line_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 1_000_000)
    file = write(lines(asked(), asked("x" * 1_000_000)), "in.jsonl")
    assert "line 2 is longer than 1 MB" in refusal(file)


# --- OpenAI's batch format ------------------------------------------------------------------


def test_a_task_is_sent_as_its_body(write: Write) -> None:
    body = rb'{"model":"m", "messages":[], "x":"\u00e4", "y":1.10}'
    line = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":%s}\n' % body
    file = write(line + lines(task("b")).encode(), "in.jsonl")
    given = opened(file)
    assert (given.format, given.endpoint) == ("openai", CHAT)
    first, second = given.rows()
    assert first == Row(number=1, line=1, body=body, custom_id="a", columns=None)
    assert (second.custom_id, second.number, second.line) == ("b", 2, 2)


def test_a_task_with_lone_surrogates_keeps_them(write: Write) -> None:
    line = lines(task("a", body={"model": "m", "messages": ["\ud800"]}))
    (row,) = opened(write(line, "in.jsonl")).rows()
    assert row.body == rb'{"model":"m","messages":["\ud800"]}'


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (task("a"), "line 2 repeats the custom_id 'a'"),
        (task("b", method="GET"), "line 2 has a method other than POST"),
        (task("b", url="/v1/embeddings"), f"line 2 has another url than the lines before ({CHAT})"),
        (task("b", url="https://x.example"), "line 2 has an unsupported url"),
        (task("b", body=5), "line 2, its body, is not a JSON object"),
        (task("b", body={"model": "m"}), "line 2 has no messages"),
        (task("b", body={**asked(), "stream": True}), "line 2 asks for a stream"),
        (task(""), "line 2 has a custom_id that is not a text that can be stored"),
        (task("b\0"), "line 2 has a custom_id that is not a text"),
        (task("b\ud800"), "line 2 has a custom_id that is not a text"),
        ({**task("b"), "custom_id": 5}, "line 2 has a custom_id that is not a text"),
        ({"custom_id": "b", "method": "POST", "url": CHAT}, "line 2 has no body"),
        ({"custom_id": "b", "url": CHAT, "body": asked()}, "line 2 has no method"),
        ({"method": "POST", "url": CHAT, "body": asked()}, "line 2 has no custom_id"),
    ],
)
def test_a_wrong_task_is_refused(write: Write, second: dict[str, object], said: str) -> None:
    assert said in refusal(write(lines(task("a"), second), "in.jsonl"))


def test_a_first_task_without_a_url_is_told_so(write: Write) -> None:
    line = lines({"custom_id": "a", "method": "POST", "body": asked()})
    assert "line 1 has no url" in refusal(write(line, "in.jsonl"))


def test_an_endpoint_other_than_the_url_is_refused(write: Write) -> None:
    said = refusal(write(lines(task("a")), "in.jsonl"), endpoint="/v1/embeddings")
    assert f"line 1 has the url '{CHAT}', not --endpoint /v1/embeddings" in said


# --- files and flags ------------------------------------------------------------------------


def test_paths_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.csv") == "FILE does not exist"
    assert refusal(tmp_path).startswith("FILE is a directory")
    assert refusal(Path("/dev/null")).startswith("FILE is not a regular file")


def test_unusable_flags_are_refused(write: Write) -> None:
    file = write("a\n1\n")
    with pytest.raises(InputError, match="--endpoint '/v2' is not one of /v1/chat/completions"):
        _ = opened(file, "{a}", endpoint="/v2")
    with pytest.raises(InputError, match="stream cannot be used"):
        _ = opened(file, "{a}", params={"stream": True})


def test_no_message_shows_the_content(write: Write) -> None:
    content = lines(asked()) + '{"messages": "SECRET",}\n'
    assert "SECRET" not in refusal(write(content, "in.jsonl"))
    assert "SECRET" not in refusal(write('a,b\n"SECRET"x,1\n'), "{a}")


def test_json_bodies_take_any_string() -> None:
    assert json_body({"a": "\ud800", "b": msgspec.Raw(b"[1]")}) == rb'{"a":"\ud800","b":[1]}'
    assert json_body({"a": "\0ä"}) == '{"a":"\\u0000ä"}'.encode()


# --- digest ---------------------------------------------------------------------------------


def test_a_digest_tells_everything_apart_that_is_sent(write: Write) -> None:
    file = write("a,b\n1,2\n")
    other = write("a,b\n1,3\n", "other.csv")
    copy = write("a,b\n1,2\n", "copy.csv")

    def of(given: Input, model: str = "m", base_url: str = "u") -> str:
        return digest(given, model=model, base_url=base_url)

    base = of(opened(file, "{a}"))
    assert len(base) == 64
    assert of(opened(copy, "{a}", params={})) == base
    different = [
        of(opened(other, "{a}")),
        of(opened(file, "{b}")),
        of(opened(file, "{a}", system="")),
        of(opened(file, "{a}", system="s")),
        of(opened(file, "{a}", params={"n": 1})),
        of(opened(file, "{a}", params={"n": "1"})),
        of(opened(file, "{a}", endpoint="/v1/responses")),
        of(opened(file, "{a}"), model="mu", base_url=""),
        of(opened(file, "{a}"), model="", base_url="mu"),
        of(opened(file, "{a}\udcff")),
    ]
    assert len({base, *different}) == len(different) + 1


def test_the_order_of_params_does_not_matter(write: Write) -> None:
    file = write("a\n1\n")
    first = opened(file, "{a}", params={"n": 1, "top_p": 1})
    second = opened(file, "{a}", params={"top_p": 1, "n": 1})
    assert digest(first, model="m", base_url="u") == digest(second, model="m", base_url="u")


def test_a_file_that_vanished_is_an_error_for_a_person(write: Write) -> None:
    file = write("a\n1\n")
    given = opened(file, "{a}")
    file.unlink()
    with pytest.raises(InputError, match="does not exist"):
        _ = digest(given, model="m", base_url="u")
    with pytest.raises(InputError, match="does not exist"):
        _ = list(given.rows())
