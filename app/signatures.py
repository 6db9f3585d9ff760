"""Signatures of what is sent to other programs, by Standard Webhooks 1.0 (symmetric, ``v1``).

A secret is ``whsec_`` and the base64 of 24 to 64 bytes. Signed are the id, the time of the try and the
exact bytes of the body, joined by dots: so an id has none. During a rotation a message carries a
signature by each secret.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

_PREFIX: Final = "whsec_"
_LEAST_BYTES: Final = 24
_MOST_BYTES: Final = 64


def mint_secret() -> str:
    """A new secret of 32 random bytes."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def checked_secret(text: str) -> str:
    """A secret that somebody chose, with its prefix. Raises ValueError when it cannot be one."""
    _key(text)
    return _PREFIX + text.removeprefix(_PREFIX)


def hint(secret: str) -> str:
    """Enough of a secret to recognise it."""
    return f"{_PREFIX}…{secret[-4:]}"


def signature(*, message_id: str, timestamp: int, body: bytes, secrets_: Sequence[str]) -> str:
    """The header ``webhook-signature``: one signature per secret, separated by spaces."""
    assert "." not in message_id
    signed = f"{message_id}.{timestamp}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()
        for secret in secrets_
    )


def _key(text: str) -> bytes:
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise ValueError(
            f"must be {_PREFIX} and the base64 of {_LEAST_BYTES} to {_MOST_BYTES} random bytes; "
            "leave it out to have one made"
        )
    return key
