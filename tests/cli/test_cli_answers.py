"""What is taken from a provider's reply, and how far things are in words."""

import pytest

from app.cli.answers import reason
from app.cli.progress import Progress, Snapshot, duration
from app.items import Result
from app.replies import answer_text

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("endpoint", "reply", "text"),
    [
        (CHAT, '{"choices":[{"message":{"content":" as it is \\n"}}]}', " as it is \n"),
        (
            CHAT,
            '{"choices":[{"message":{"content":null,"tool_calls":[{"id":"a"}]}}]}',
            '[{"id":"a"}]',
        ),
        (CHAT, '{"choices":[{"message":{"content":null,"refusal":"no"}}]}', "no"),
        (CHAT, '{"choices":[]}', ""),
        (CHAT, "[1]", ""),
        (CHAT, None, ""),
        (
            "/v1/responses",
            (
                '{"output":[{"type":"reasoning"},{"content":[{"type":"output_text","text":"a"},'
                '{"type":"output_text","text":"b"}]}]}'
            ),
            "ab",
        ),
        ("/v1/completions", '{"choices":[{"text":"a"}]}', "a"),
        ("/v1/embeddings", '{"data":[{"embedding":[0.5,1]}]}', "[0.5,1]"),
        ("/v1/embeddings", '{"data":[{"embedding":[1]},{"embedding":[2]}]}', "[[1],[2]]"),
        ("/v1/moderations", '{"results":[{"flagged":false}]}', '[{"flagged":false}]'),
    ],
)
def test_answer_is_the_text_of_the_reply(endpoint: str, reply: str | None, text: str) -> None:
    assert answer_text(endpoint, reply) == text


def test_reason_names_code_and_message() -> None:
    failed = Result(
        seq=0,
        status="failed",
        status_code=401,
        response=None,
        error_code="unauthorized",
        error_message="The provider refused the key.",
        custom_id=None,
        request_id=None,
    )
    assert reason(failed) == "unauthorized: The provider refused the key."
    assert reason(None).startswith("not answered yet")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (184, "3:04"), (7384, "2:03:04")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_tells_a_line_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0

    def snapshot(answered: int) -> Snapshot:
        return Snapshot(
            total=100,
            answered=answered,
            failed=1,
            cancelled=0,
            in_flight=7,
            input_tokens=1000,
            output_tokens=2000,
            limit_share=0.98,
            limit_kind="500 requests a minute",
            wait_s=12.0,
        )

    with Progress(clock=lambda: now) as view:
        for second in range(11):
            now = float(second)
            view.show(snapshot(second * 4))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1] == (
        "41 of 100 done, 1 failed, 7 in flight, 4.0/s, 1,000 tokens in, 2,000 out, "
        "98% of the limit of 500 requests a minute in use, waiting for the rate limit, "
        "next in 12 s, about 15 s left"
    )
