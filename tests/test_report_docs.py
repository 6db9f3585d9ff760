"""docs/reporting.md and the contract of the views: what is written is what is there.

``python -m tests.test_report_docs URL`` writes dictionary and columns anew, from the database at that address.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import psycopg

from app.reports import View, views
from tests.scene import Scene
from tests.test_reports import history

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reporting.md"
COLUMNS = ROOT / "tests" / "report_columns.txt"
MARK = "<!-- dictionary: made from the comments by tests/test_report_docs.py -->\n"
QUESTIONS = re.findall(
    r"### \d+\. (.*?)\n\n```sql\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL
)


def dictionary(known: Mapping[str, View]) -> str:
    """The data dictionary as Markdown."""
    parts = ["\n## Data dictionary\n"]
    for view in known.values():
        parts.append(
            f"\n### report.{view.name}\n\n{view.about}\n\n| column | type | |\n|---|---|---|\n"
        )
        parts += [f"| `{c.name}` | {c.type} | {c.about} |\n" for c in view.columns]
    return "".join(parts)


def contract(known: Mapping[str, View]) -> list[str]:
    """One line per column."""
    return [f"{view.name}.{c.name} {c.type}" for view in known.values() for c in view.columns]


async def described(url: str) -> dict[str, View]:
    async with await psycopg.AsyncConnection.connect(url) as conn:
        return await views(conn)


async def test_no_column_was_removed_renamed_or_changed(shared_database: str) -> None:
    """A reader's query goes on working: after a deliberate addition write the file anew."""
    known = await described(shared_database)
    promised = COLUMNS.read_text("utf-8").splitlines()
    present = contract(known)
    assert [line for line in promised if line not in present] == [], "removed, renamed or changed"
    assert [line for line in present if line not in promised] == [], "new: write the files anew"
    unexplained = [
        f"{view.name}.{c.name}"
        for view in known.values()
        for c in view.columns
        if not (c.about and view.about)
    ]
    assert unexplained == []


async def test_the_dictionary_is_what_the_comments_say(shared_database: str) -> None:
    written = DOCUMENT.read_text("utf-8").partition(MARK)[2]
    assert written == dictionary(await described(shared_database))


def test_there_are_thirty_one_questions() -> None:
    assert len(QUESTIONS) == 31


async def test_every_question_is_answered(database: str) -> None:
    """Each of them runs on a small history as a reader of it would run it."""
    async with Scene.open(database, rpm=100) as scene:
        await history(scene)
        await scene.submit(3)
        await scene.claim(1)
        for question, text in QUESTIONS:
            async with scene.db.connection() as conn:
                cursor = await conn.execute(text.encode())
                assert cursor.description, question
                await cursor.fetchall()


def write(url: str) -> None:
    """Put the dictionary and the columns where they belong."""
    import asyncio  # noqa: PLC0415 - a developer's command

    known = asyncio.run(described(url))
    head = DOCUMENT.read_text("utf-8").partition(MARK)[0]
    DOCUMENT.write_text(head + MARK + dictionary(known), "utf-8")
    COLUMNS.write_text("\n".join(contract(known)) + "\n", "utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
