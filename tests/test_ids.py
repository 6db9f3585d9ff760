"""UUIDv7 and the arithmetic between a batch's id and its items'."""

from datetime import date
from uuid import RFC_4122, UUID

from hypothesis import given
from hypothesis import strategies as st

from app.db import Connection
from app.ids import created_on, item_id, item_seq, uuid7

MOST_SEQ = 2**31 - 2
SEQS = st.integers(0, MOST_SEQ)
#: Up to the end of the year 9999, where Python's calendar ends.
IDS = st.builds(uuid7, st.integers(0, 253_402_300_799_999))


@given(IDS)
def test_an_id_has_version_7_and_the_variant_of_the_rfc(made: UUID) -> None:
    assert made.version == 7
    assert made.variant == RFC_4122


@given(st.integers(0, 2**48 - 2), st.integers(1, 2**20))
def test_a_later_id_is_greater_as_number_and_as_text(at_ms: int, later_ms: int) -> None:
    later_ms = min(at_ms + later_ms, 2**48 - 1)
    first, second = uuid7(at_ms), uuid7(later_ms)
    assert first < second
    assert str(first) < str(second)
    assert first.int >> 80 == at_ms


def test_ids_of_the_same_moment_differ() -> None:
    assert len({uuid7(1_700_000_000_000) for _ in range(1000)}) == 1000


def test_an_id_of_now_knows_its_day() -> None:
    # 2026-03-01T00:00:00Z and the millisecond before it.
    assert created_on(uuid7(1_772_323_200_000)) == date(2026, 3, 1)
    assert created_on(uuid7(1_772_323_199_999)) == date(2026, 2, 28)


@given(IDS, SEQS)
def test_an_item_s_number_follows_from_its_id(batch_id: UUID, seq: int) -> None:
    item = item_id(batch_id, seq)
    assert item != batch_id
    assert item_seq(batch_id, item) == seq
    # The day stays readable, and it stays a UUIDv7.
    assert created_on(item) == created_on(batch_id)
    assert (item.version, item.variant) == (7, RFC_4122)


@given(IDS, IDS)
def test_an_item_of_another_batch_has_no_number(batch_id: UUID, other: UUID) -> None:
    assert item_seq(batch_id, batch_id) is None
    if batch_id.int >> 32 != other.int >> 32:
        assert item_seq(batch_id, item_id(other, 0)) is None


async def test_postgres_agrees(conn: Connection) -> None:
    """The same arithmetic stands in sql/functions/clock.sql, for reports and the API's rows."""
    ids = [uuid7(), UUID(int=uuid7().int | 0xFFFF_FFFF), UUID(int=uuid7().int & ~0xFFFF_FFFF)]
    seqs = [0, 1, 254, 255, 65_535, 2**30, MOST_SEQ]
    given = [(batch_id, seq) for batch_id in ids for seq in seqs]
    cursor = await conn.execute(
        "select item_id(b, s) from unnest(%s::uuid[], %s::int[]) with ordinality as g (b, s, n)"
        " order by n",
        ([b for b, _ in given], [s for _, s in given]),
    )
    assert [row[0] for row in await cursor.fetchall()] == [item_id(b, s) for b, s in given]
