"""Loops that are kept running, and stopped."""

import asyncio

from app.supervision import Supervisor


async def test_a_loop_that_loses_a_cancellation_is_stopped_all_the_same() -> None:
    """As asyncio.wait_for does before Python 3.12, when what it waits for is done at that moment."""
    lost = 0

    async def loop() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
                if lost == 2:
                    raise

    supervisor = Supervisor("test")
    supervisor.start("loop", loop)
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await supervisor.stop()
    assert lost == 2
