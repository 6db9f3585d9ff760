"""Logging: an event's name and facts, ``item.completed batch=… latency_ms=812``.

Names are ``noun.verb_past`` and are listed in README.md. INFO tells the story of a batch, DEBUG of
an item; a WARNING is something a person may act on, an ERROR something one must.
"""

import logging
import sys

_QUOTED = ' "=\n\t'


def _shown(value: object) -> str:
    text = str(value)
    if not text or any(c in text for c in _QUOTED):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return text


class Log:
    """A named logger that writes facts. Never give it a prompt, an answer or a secret."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"sluice.{name}")

    def debug(self, event: str, **facts: object) -> None:
        """Part of the story of one item."""
        self._write(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: object) -> None:
        """Part of the story of a batch or a process."""
        self._write(logging.INFO, event, facts)

    def warning(self, event: str, **facts: object) -> None:
        """Something that a person may want to act on."""
        self._write(logging.WARNING, event, facts)

    def error(self, event: str, **facts: object) -> None:
        """Something that a person must act on."""
        self._write(logging.ERROR, event, facts)

    def _write(self, level: int, event: str, facts: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            told = " ".join(f"{name}={_shown(value)}" for name, value in facts.items())
            self._logger.log(level, "%s %s", event, told)


def configure(level: str) -> None:
    """Write the log to standard error, one line per event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("sluice")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    # The pool reports every try of every connection while a database is away; we say it once.
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
