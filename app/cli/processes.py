"""What the long-running commands share: the event loop, garbage, and what SIGTERM and Ctrl-C do."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from app import log
from app.settings import Settings

try:
    from uvloop import new_event_loop
except ImportError:  # not made for Windows
    new_event_loop = None

Result = TypeVar("Result")


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, on uvloop where there is one."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def spare_what_stays() -> None:
    """Let garbage collection pass over what is there by now, once a service has started.

    It stays until the end, and looking through all of it stops the event loop: for 70 to 180 ms of
    processor time in an API with a thousand streams. Young objects are looked through less often too:
    Python's default of 700 is less than a thousand streams make in one turn of the loop.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@contextlib.contextmanager
def on_signals(
    first: Callable[[signal.Signals], None], then: Callable[[], None]
) -> Generator[None]:
    """Call ``first`` at the first SIGINT or SIGTERM and ``then`` at each later one.

    In the event loop, not in a signal handler: both may do anything that does not block.
    """
    loop = asyncio.get_running_loop()
    seen = False

    def heard(number: signal.Signals) -> None:
        nonlocal seen
        if seen:
            then()
        else:
            seen = True
            first(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def log_for_service(settings: Settings) -> None:
    """Tell the story on standard error."""
    log.configure(settings.log_level)


def log_for_person(settings: Settings) -> None:
    """Only what a person must act on, unless SLUICE_LOG_LEVEL asks for more: a bar is being shown."""
    log.configure(settings.log_level if "log_level" in settings.model_fields_set else "error")
