"""Asking the database once for all who ask the same meanwhile.

After an API process was restarted a thousand followers come back within a second, each with the same
key for the same batch. Keeping answers for a while would let a revoked key in; sharing does not.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Asked = TypeVar("Asked", bound=Hashable)
Answer = TypeVar("Answer")


class Together(Generic[Asked, Answer]):
    """One look-up of a kind at a time for the same question.

    Who asks while one is under way waits for the next, which all share who came meanwhile: nobody is
    given an answer that was looked up before they asked, and so what was revoked is revoked at once.
    """

    def __init__(self, look_up: Callable[[Asked], Awaitable[Answer]]) -> None:
        self._look_up = look_up
        self._under_way = dict[Asked, asyncio.Task[Answer]]()
        self._next = dict[Asked, asyncio.Task[Answer]]()

    async def ask(self, asked: Asked) -> Answer:
        """The answer as of now or later. Raises what the look-up raises, to all who share it."""
        task = self._next.get(asked)
        if task is None:
            before = self._under_way.get(asked)
            task = self._next[asked] = asyncio.create_task(self._follow(asked, before))
        return await asyncio.shield(task)  # one who leaves must not take it from the others

    async def _follow(self, asked: Asked, before: asyncio.Task[Answer] | None) -> Answer:
        if before is not None:
            await asyncio.wait({before})
        self._under_way[asked] = self._next.pop(asked)
        try:
            return await self._look_up(asked)
        finally:
            del self._under_way[asked]
