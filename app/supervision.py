"""Supervision: no background loop dies silently.

A loop that raises or returns is started again after a jittered pause that grows with repeated
failures; what happened is logged. (The missing reconnect in one loop is what breaks most queues.)
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from app.log import Log

log = Log("supervision")

_STEADY_S = 30.0


class Supervisor:
    """Keeps loops running until ``stop``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run ``loop()`` from now on, and again whenever it ends."""
        self._tasks.append(asyncio.create_task(self._keep(name, loop), name=f"{self._name}.{name}"))

    async def stop(self) -> None:
        """Cancel all loops and wait for them."""
        waiting = set(self._tasks)
        while waiting:
            # Again and again: a cancellation can be lost on its way, as asyncio.wait_for loses it
            # before Python 3.12 when what it waits for is done at that moment (bpo-37658).
            for task in waiting:
                task.cancel()
            _, waiting = await asyncio.wait(waiting, timeout=0.2)
        self._tasks.clear()

    async def _keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            begun = clock()
            try:
                await loop()
                reason = "it returned"
            except Exception as error:  # noqa: BLE001 - the point of a supervisor
                reason = f"{type(error).__name__}: {error}"
            failures = 0 if clock() - begun > _STEADY_S else failures + 1
            pause_s = random.uniform(0.1, min(5.0, 0.2 * 2**failures))  # noqa: S311 - jitter
            log.error(
                "loop.restarted",
                loop=f"{self._name}.{name}",
                reason=reason,
                pause_s=round(pause_s, 2),
            )
            await asyncio.sleep(pause_s)
