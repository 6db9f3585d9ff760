"""Questions that many ask at once are looked up once, and never answered from before they were asked."""

import asyncio

import pytest

from app.api.together import Together
from tests.api.conftest import Service, until


class Lookups:
    """Each look-up ends when it is let; its answer is how many began before it."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Future[None]] = []

    async def __call__(self, _: str) -> int:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begun.append(end)
        number = len(self.begun)
        await end
        return number


def ask(together: Together[str, int], many: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(together.ask("x")) for _ in range(many)]


async def test_who_asks_meanwhile_shares_the_next_lookup() -> None:
    """Never the one under way: it may have seen what was revoked before they asked."""
    lookups = Lookups()
    together = Together[str, int](lookups)
    first = ask(together, 3)
    await until(lambda: len(lookups.begun) == 1)
    others = ask(together, 1000)
    await asyncio.sleep(0)
    lookups.begun[0].set_result(None)
    assert await asyncio.gather(*first) == [1] * 3
    await until(lambda: len(lookups.begun) == 2)
    lookups.begun[1].set_result(None)
    assert await asyncio.gather(*others) == [2] * 1000
    assert not together._under_way  # pyright: ignore[reportPrivateUsage] - the leak looked for
    assert not together._next  # pyright: ignore[reportPrivateUsage] - the leak looked for


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    lookups = Lookups()
    together = Together[str, int](lookups)
    leaving, staying = ask(together, 2)
    await until(lambda: len(lookups.begun) == 1)
    leaving.cancel()
    lookups.begun[0].set_result(None)
    assert await staying == 1
    assert leaving.cancelled()


async def test_a_failure_is_told_to_all_who_share_it_and_to_nobody_after() -> None:
    lookups = Lookups()
    together = Together[str, int](lookups)
    some = ask(together, 2)
    await until(lambda: len(lookups.begun) == 1)
    after = ask(together, 1)
    await asyncio.sleep(0)
    lookups.begun[0].set_exception(OSError("away"))
    assert all(isinstance(e, OSError) for e in await asyncio.gather(*some, return_exceptions=True))
    await until(lambda: len(lookups.begun) == 2)
    lookups.begun[1].set_result(None)
    assert await after[0] == 2


async def test_followers_who_come_together_are_let_in_by_few_statements(
    service: Service, monkeypatch: pytest.MonkeyPatch, statements: list[str]
) -> None:
    """Fifty, while the first look-up takes its time: it and the next one serve all."""
    batch = await service.create("a")
    asked: list[object] = []
    original = Together[object, object].ask

    async def counted(self: Together[object, object], what: object) -> object:
        asked.append(what)
        return await original(self, what)

    monkeypatch.setattr(Together, "ask", counted)

    async def follow() -> int:
        async with service.follow(batch, slim="true") as stream:
            return len(await stream.rest())

    async with service.db.transaction() as conn:
        await conn.execute("lock table api_keys in access exclusive mode")
        statements.clear()
        followers = [asyncio.create_task(follow()) for _ in range(50)]
        await until(lambda: asked.count(service.key) == 50)
    await until(lambda: service.hub.followers == 50)
    assert statements.count("api_key_by_hash") <= 2
    assert statements.count("batch_get") + statements.count("events_after") <= 10
    await service.work()
    assert await asyncio.gather(*followers) == [5] * 50
