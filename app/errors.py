"""Every error Sluice raises on purpose, in one tree.

SluiceError                     a sentence for a person: what is wrong, where, and what to do
├── UsageError                  a wrong flag or setting                           (exit 2)
│   ├── SettingsError           a SLUICE_* variable cannot be used
│   └── InputError              an input file cannot be used; names the line
├── SecretError                 a secret cannot be sealed or opened
├── EmbeddedError               the embedded Postgres cannot be used
├── DatabaseUnavailableError    the database does not answer                      (503)
└── RequestError                a request the API refuses; knows status and code
    ├── ValidationError         400 GENERIC_VALIDATION, one entry per wrong field
    ├── UnauthenticatedError    401
    ├── ForbiddenError          403
    ├── NotFoundError           404
    ├── ConflictError           409, permanent: never worth an automatic retry
    ├── TooLargeError           413
    ├── QuotaError              429, worth repeating later
    └── IssuerUnavailableError  503: the issuer of users' tokens does not answer

A message never carries a prompt, a provider's body or a secret: messages are logged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class SluiceError(Exception):
    """Something that a person can act on; ``str()`` of it is the whole sentence to show."""


class UsageError(SluiceError):
    """The command line or the settings are wrong; nothing was started."""


class SettingsError(UsageError):
    """A setting is missing or cannot be understood."""


class InputError(UsageError):
    """An input file cannot be used. Names file and line; nothing of it was kept."""


class SecretError(SluiceError):
    """A secret cannot be sealed or opened, usually because its key is not configured."""


class EmbeddedError(SluiceError):
    """The embedded Postgres cannot be started, joined or stopped."""


class DatabaseUnavailableError(SluiceError):
    """The database does not answer. Nothing was lost: repeat the request when it is back."""


class RequestError(SluiceError):
    """A request that cannot be served as it is.

    ``code`` is the wire's ``errorCode``; ``details`` is what a program needs beside the sentence.
    """

    status: ClassVar[int] = 400

    def __init__(
        self, message: str, *, code: str | None = None, details: dict[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code or str(self.status)
        self.details = details or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a request: ``path`` as in ``items[3].request.messages``."""

    path: str
    message: str


class ValidationError(RequestError):
    """The request's content is wrong. Carries at most the first 100 problems."""

    MOST: ClassVar[int] = 100

    def __init__(self, problems: Sequence[Problem], *, message: str | None = None) -> None:
        listed = problems[: self.MOST]
        first = listed[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            message or f"Validation error: {first.path}: {first.message}{more}",
            code="GENERIC_VALIDATION",
            details={"errors": [{"path": p.path, "message": p.message} for p in listed]},
        )
        self.problems = list(listed)


class UnauthenticatedError(RequestError):
    """No credential, or one that is unknown, disabled or expired: all look the same."""

    status = 401


class ForbiddenError(RequestError):
    """The caller is known and may not do this."""

    status = 403


class NotFoundError(RequestError):
    """There is no such thing in the caller's workspace."""

    status = 404


class ConflictError(RequestError):
    """The thing is in a state that does not allow this; repeating will not help."""

    status = 409


class IssuerUnavailableError(RequestError):
    """The issuer of users' tokens does not answer, so nobody can say whether a token is good."""

    status = 503


class TooLargeError(RequestError):
    """The request is larger than a configured limit, which the message names."""

    status = 413


class QuotaError(RequestError):
    """The workspace has as much in the queue as it may; repeat it in ``retry_after_s``."""

    status = 429

    def __init__(
        self, message: str, *, code: str, details: dict[str, object], retry_after_s: int
    ) -> None:
        super().__init__(message, code=code, details=details)
        self.retry_after_s = retry_after_s
