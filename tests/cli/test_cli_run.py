"""The main job: a file of questions becomes a file of answers, whatever happens in between."""

import json
import signal
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from tests.cli.conftest import Cli, Provider, until

PROMPT = ("--prompt", "Answer: {text}", "--model", "m", "--output", "out.csv")


def ask(provider: Provider, *more: str, file: str = "q.csv") -> list[str]:
    return ["run", file, *PROMPT, "--base-url", provider.url, *more]


def test_rows_are_answered_in_order_with_their_columns(cli: Cli, provider: Provider) -> None:
    texts = ["first", "a, comma", 'a "quote"', "two\nlines", "naïve 🙂", "<|endoftext|>"]
    cli.questions(texts)
    process = cli.start(*ask(provider))
    told, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert "Answered 6 of 6 rows" in told
    rows = cli.rows()
    assert [row["text"] for row in rows] == texts
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(row["answer"].startswith("[simulated]") for row in rows)
    assert {row["error"] for row in rows} == {""}


def test_texts_that_differ_only_in_spaces_are_both_asked(cli: Cli, provider: Provider) -> None:
    cli.questions(["same", "same ", " same"])
    assert cli.run(*ask(provider)).exit_code == 0
    assert [row["text"] for row in cli.rows()] == ["same", "same ", " same"]
    assert provider.report()["answered"] == 3
    assert provider.report()["answered_twice"] == 0


def test_second_run_sends_nothing(cli: Cli, provider: Provider) -> None:
    cli.questions(["one", "two"])
    assert cli.run(*ask(provider)).exit_code == 0
    (cli.folder / "out.csv").unlink()
    again = cli.run(*ask(provider, "--rpm", "500", "--api-key", "sk-other"))
    assert again.exit_code == 0
    assert "nothing was sent" in again.stdout
    assert len(cli.rows()) == 2
    assert provider.report()["received"] == 2


def test_rest_after_a_limit_asks_no_row_twice(cli: Cli, provider: Provider) -> None:
    cli.questions([f"question {n}" for n in range(30)])
    assert cli.run(*ask(provider, "--limit", "10")).exit_code == 0
    assert len(cli.rows()) == 10
    assert cli.run(*ask(provider)).exit_code == 0
    rows = cli.rows()
    assert [row["text"] for row in rows] == [f"question {n}" for n in range(30)]
    assert all(row["answer"] for row in rows)
    assert provider.report()["received"] == 30
    assert provider.report()["called_twice"] == 0


def test_limit_after_the_whole_writes_the_first_rows(cli: Cli, provider: Provider) -> None:
    cli.questions(["one", "two", "three"])
    assert cli.run(*ask(provider)).exit_code == 0
    assert cli.run(*ask(provider, "--limit", "2")).exit_code == 0
    assert [row["text"] for row in cli.rows()] == ["one", "two"]
    assert provider.report()["received"] == 3


def test_fresh_asks_everything_again_and_is_then_the_run(cli: Cli, provider: Provider) -> None:
    cli.questions(["one", "two"])
    assert cli.run(*ask(provider)).exit_code == 0
    assert cli.run(*ask(provider, "--fresh")).exit_code == 0
    assert provider.report()["received"] == 4
    assert "nothing was sent" in cli.run(*ask(provider)).stdout


def test_other_parameters_are_another_run(cli: Cli, provider: Provider) -> None:
    cli.questions(["one"])
    assert cli.run(*ask(provider)).exit_code == 0
    assert cli.run(*ask(provider, "--param", "temperature=0")).exit_code == 0
    assert provider.report()["received"] == 2


def test_refused_key_fails_rows_and_the_right_one_answers_them(
    cli: Cli, provider: Provider
) -> None:
    provider.change(require_key="sk-right")
    cli.questions(["one", "two"])
    failed = cli.run(*ask(provider, "--api-key", "sk-wrong"))
    assert failed.exit_code == 1
    assert "2 rows failed, because: unauthorized: The provider refused the key" in failed.stdout
    assert all("refused the key" in row["error"] for row in cli.rows())
    mended = cli.run(*ask(provider), env={"OPENAI_API_KEY": "sk-right"})
    assert mended.exit_code == 0, mended.output
    assert "2 rows failed last time; trying them again" in mended.stderr
    assert all(row["answer"] and not row["error"] for row in cli.rows())


def test_unreachable_provider_fails_rows_with_the_reason(cli: Cli) -> None:
    """Nothing listens on port 9: every try is refused, and the row says so."""
    cli.questions(["one"])
    ended = cli.run(
        "run", "q.csv", *PROMPT, "--base-url", "http://127.0.0.1:9/v1", "--max-attempts", "2"
    )
    assert ended.exit_code == 1
    (row,) = cli.rows()
    assert row["answer"] == ""
    assert "connect" in row["error"].lower()


def test_failing_provider_is_asked_as_often_as_allowed(cli: Cli, provider: Provider) -> None:
    cli.questions(["one"])
    provider.change(error_rate=1.0)
    ended = cli.run(*ask(provider, "--max-attempts", "2"))
    assert ended.exit_code == 1
    assert provider.report()["received"] == 2
    (row,) = cli.rows()
    assert row["answer"] == ""
    assert row["error"]


def test_killed_run_goes_on_where_it_was(cli: Cli, provider: Provider) -> None:
    provider.change(latency_ms=300.0)
    cli.questions([f"question {n}" for n in range(200)])
    process = cli.start(*ask(provider, "--concurrency", "20"))
    until(lambda: provider.report()["answered"] >= 60, what="some are answered", by=process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Its duty as maintenance lapses by itself after ten seconds, which need not be waited for here.
    with psycopg.connect(cli.env["SLUICE_DATABASE_URL"], autocommit=True) as conn:
        conn.execute("delete from leases")
    provider.change(latency_ms=20.0)
    ended = cli.run(*ask(provider))
    assert ended.exit_code == 0, ended.output
    rows = cli.rows()
    assert [row["text"] for row in rows] == [f"question {n}" for n in range(200)]
    assert all(row["answer"] for row in rows)
    # In flight at the kill, and those whose answers were on their way into the database.
    assert provider.report()["called_twice"] <= 40


def test_ctrl_c_finishes_calls_writes_what_there_is_and_goes_on_later(
    cli: Cli, provider: Provider
) -> None:
    provider.change(latency_ms=200.0)
    cli.questions([f"question {n}" for n in range(150)])
    process = cli.start(*ask(provider, "--concurrency", "10"))
    until(lambda: provider.report()["answered"] >= 20, what="some are answered", by=process)
    process.send_signal(signal.SIGINT)
    told, complaints = process.communicate(timeout=30)
    assert process.returncode == 130, complaints
    assert "Run the same command to go on" in complaints
    assert "rows are not answered yet" in told
    rows = cli.rows()
    answered = sum(bool(row["answer"]) for row in rows)
    assert 20 <= answered < 150
    assert {row["error"] for row in rows if not row["answer"]} == {
        "not answered yet: run the same command to go on"
    }
    provider.change(latency_ms=5.0)
    # What was stopped stays stopped while others run, and goes on when it is asked for.
    cli.questions(["something else"], name="other.csv")
    assert cli.run(*ask(provider, file="other.csv")).exit_code == 0
    assert provider.report()["received"] == answered + 1
    assert cli.run(*ask(provider)).exit_code == 0
    assert all(row["answer"] for row in cli.rows())
    assert provider.report()["called_twice"] == 0


def test_two_processes_may_do_the_same_run(cli: Cli, provider: Provider) -> None:
    provider.change(latency_ms=100.0)
    cli.questions([f"question {n}" for n in range(120)])
    both = [
        cli.start("run", "q.csv", *PROMPT[:4], "--base-url", provider.url, "-o", f"{n}.csv")
        for n in range(2)
    ]
    for process in both:
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 0, complaints
    assert cli.rows("0.csv") == cli.rows("1.csv")
    assert provider.report()["received"] == 120
    assert provider.report()["called_twice"] == 0


def test_column_that_is_taken_gets_a_number(cli: Cli, provider: Provider) -> None:
    cli.write("q.csv", "text,answer,error,error_2\nhello,old,x,y\n")
    assert cli.run(*ask(provider)).exit_code == 0
    (row,) = cli.rows()
    assert (row["answer"], row["error"], row["error_2"]) == ("old", "x", "y")
    assert row["answer_2"].startswith("[simulated]")
    assert row["error_3"] == ""


def test_json_lines_keep_the_reply_and_need_no_model_flag(cli: Cli, provider: Provider) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a \0 and \u2028"}]}
    cli.write("q.jsonl", json.dumps(body) + "\n\n" + json.dumps(body | {"seed": 1}) + "\n")
    ended = cli.run("run", "q.jsonl", "--base-url", provider.url)
    assert ended.exit_code == 0, ended.output
    lines = cli.lines("q.answers.jsonl")
    assert [line["row"] for line in lines] == [1, 2]
    for line in lines:
        assert line["answer"] == line["response"]["choices"][0]["message"]["content"]
        assert line["error"] is None


def test_half_of_a_surrogate_pair_is_sent_as_it_is_and_may_be_refused(
    cli: Cli, provider: Provider
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "half \ud83d of a pair"}]}
    cli.write("q.jsonl", json.dumps(body) + "\n")
    ended = cli.run("run", "q.jsonl", "--base-url", provider.url)
    assert ended.exit_code == 1
    assert provider.report()["invalid"] == 1
    (line,) = cli.lines("q.answers.jsonl")
    assert line["error"]["code"] == "bad_request"


def test_openai_lines_come_back_as_openai_lines(cli: Cli, provider: Provider) -> None:
    body = {"model": "e", "input": "a text"}
    line = {"custom_id": "a-1", "method": "POST", "url": "/v1/embeddings", "body": body}
    cli.write("q.jsonl", json.dumps(line) + "\n")
    ended = cli.run("run", "q.jsonl", "--base-url", provider.url, "-o", "out.jsonl")
    assert ended.exit_code == 0, ended.output
    (answer,) = cli.lines("out.jsonl")
    assert answer["custom_id"] == "a-1"
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["data"][0]["embedding"]


def test_full_disk_is_one_sentence_and_loses_nothing(cli: Cli, provider: Provider) -> None:
    cli.questions([f"question {n} " + "x" * 200 for n in range(100)])
    process = cli.start(*ask(provider), command=("bash", "-c", 'ulimit -f 4; exec "$@"', "_"))
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "out.csv cannot be written: File too large" in complaints
    assert "answers are safe in the database" in complaints
    assert "Traceback" not in complaints
    assert [f.name for f in cli.folder.iterdir() if "out.csv" in f.name] == []
    assert "nothing was sent" in cli.run(*ask(provider)).stdout
    assert len(cli.rows()) == 100


def test_limit_of_the_run_is_kept(cli: Cli, provider: Provider) -> None:
    provider.change(rpm=20)
    cli.questions([f"question {n}" for n in range(20)])
    at_once = {"SLUICE_BURST_S": "60"}  # spent evenly, it would take the whole minute
    command = ask(provider, "--rpm", "20", "--tpm", "100000")
    assert cli.run(*command, env=at_once).exit_code == 0
    assert provider.report()["refused"] == 0
    assert provider.report()["over_limit"] == 0


# Bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "arguments", "code", "says"),
    [
        ("id,text\n1,a\n", ["--prompt", "{nope}"], 2, "column 'nope' in --prompt is not in q.csv"),
        ("id,text\n1,a\n", [], 2, "say what to ask with --prompt"),
        ("id,text\n1,a\n2\n", ["--prompt", "{text}"], 2, "q.csv line 3 has 1 values"),
        ("", ["--prompt", "{text}"], 2, "q.csv has no rows"),
        ("id,text\n", ["--prompt", "{text}"], 2, "q.csv has no rows"),
        ('{"messages":[]}\n{"messages":\n', ["--format", "jsonl"], 2, "q.csv line 2 is not valid"),
        (
            "id,text\n1,a\n2," + "word " * 500 + "\n",
            ["--prompt", "{text}", "--tpm", "100"],
            2,
            "q.csv line 3: its prompt of about",
        ),
        ("text\n" + "x" * 3000 + "\n", ["--prompt", "{text}"], 2, "q.csv line 2: the request is"),
        ("text\na\n", ["--prompt", "{text}", "--output", "q.csv"], 2, "is the input itself"),
        ("text\na\n", ["--prompt", "{text}", "--output", "no/a.csv"], 2, "there is no directory"),
        ("text\na\n", ["--prompt", "{text}", "--base-url", "host/v1"], 2, "is not a URL"),
        ("text\na\n", ["--prompt", "{text}", "--param", "temperature"], 2, "is not name=value"),
        ("text\na\n", ["--prompt", "{text}", "--resource", "r"], 2, "goes with --server"),
        ("text\na\n", ["--prompt", "{text}", "--server", "http://x"], 2, "Which key?"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_kept(
    cli: Cli, content: str, arguments: list[str], code: int, says: str
) -> None:
    cli.write("q.csv", content)
    given = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1", *arguments]
    ended = cli.run("run", "q.csv", *given, env={"SLUICE_MAX_ITEM_BYTES": "2900"})
    assert ended.exit_code == code, ended.output
    assert says in ended.stderr
    assert "Traceback" not in ended.output
    with psycopg.connect(cli.env["SLUICE_DATABASE_URL"]) as conn:
        assert conn.execute("select count(*) from batches").fetchone() == (0,)
        assert conn.execute("select count(*) from items").fetchone() == (0,)


def test_missing_file_and_missing_model_are_told(cli: Cli) -> None:
    assert "none.csv does not exist" in cli.run("run", "none.csv", "--prompt", "x").stderr
    cli.questions(["a"])
    ended = cli.run("run", "q.csv", "--prompt", "{text}")
    assert ended.exit_code == 2
    assert "say which model with --model" in ended.stderr


def test_openai_without_a_key_is_told(cli: Cli) -> None:
    cli.questions(["a"])
    ended = cli.run("run", "q.csv", "--prompt", "{text}", "--model", "m")
    assert ended.exit_code == 2
    assert "OPENAI_API_KEY" in ended.stderr


def test_dead_database_is_told(cli: Cli, provider: Provider) -> None:
    cli.questions(["a"])
    dead = {"SLUICE_DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:9/none"}
    ended = cli.run(*ask(provider), env=dead)
    assert ended.exit_code == 1
    assert "SLUICE_DATABASE_URL" in ended.stderr
    assert "secret" not in ended.output
    assert "Traceback" not in ended.output


def test_unknown_setting_is_told(cli: Cli) -> None:
    ended = cli.run("run", "q.csv", env={"SLUICE_NOPE": "1"})
    assert ended.exit_code == 2
    assert "SLUICE_NOPE is not a setting" in ended.stderr


def test_given_database_needs_a_secret_key(cli: Cli, provider: Provider) -> None:
    cli.questions(["a"])
    ended = cli.run(*ask(provider), env={"SLUICE_SECRET_KEY": ""})
    assert ended.exit_code == 2
    assert "SLUICE_SECRET_KEY is missing" in ended.stderr


def test_nothing_is_left_beside_the_output(cli: Cli, provider: Provider, tmp_path: Path) -> None:
    cli.questions([str(uuid4())])
    assert cli.run(*ask(provider)).exit_code == 0
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_file()) == ["out.csv", "q.csv"]
