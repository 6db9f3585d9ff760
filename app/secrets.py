"""Secrets at rest (provider keys, webhook secrets) and the keys that programs enter with.

Secrets are sealed with AES-256-GCM under a key of ``SLUICE_SECRET_KEY``. A sealed secret carries
the id of its key, so that keys can be rotated: put the new key first and keep the old one until
nothing needs it. It is bound to its ``context`` (which row it belongs to): a sealed value copied
to another row does not open. Api keys are stored as their SHA-256 only; 256 random bits
need no salt and no slow hash.
"""

import base64
import binascii
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import SecretError

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12  # NIST SP 800-38D; random nonces are safe for 2^32 secrets per key
_API_KEY_PREFIX: Final = "slk_"
_MASK_FROM: Final = 20  # characters; of anything shorter, twelve visible ones would be too many
_KEY_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+={0,2}")
_FORM: Final = (
    "SLUICE_SECRET_KEY takes 32 random bytes as base64url, or several of them, comma separated, "
    "newest first, each optionally as id:key"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A secret as it is stored: the id of the key, and nonce + ciphertext + tag."""

    key_id: str
    ciphertext: bytes


class Keyring:
    """The keys of ``SLUICE_SECRET_KEY``: the first seals, all open."""

    def __init__(self, setting: str) -> None:
        self._ciphers: dict[str, AESGCM] = {}
        for number, entry in enumerate(setting.split(","), start=1):
            key_id, key = _parse(entry.strip(), number)
            if key_id in self._ciphers:
                raise SecretError(f"SLUICE_SECRET_KEY names the key '{key_id}' twice")
            self._ciphers[key_id] = AESGCM(key)
        self.key_id: str = next(iter(self._ciphers))

    @staticmethod
    def generate() -> str:
        """A new key, in the form that SLUICE_SECRET_KEY takes."""
        return secrets.token_urlsafe(_KEY_BYTES)

    def seal(self, plaintext: str, *, context: str) -> Sealed:
        """Encrypt with the current key; only the same ``context`` opens it again."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[self.key_id].encrypt(nonce, _bytes(plaintext), _bytes(context))
        return Sealed(key_id=self.key_id, ciphertext=nonce + sealed)

    def open(self, sealed: Sealed, *, context: str) -> str:
        """Decrypt; raises `SecretError` for an unknown key, another context or altered bytes."""
        cipher = self._ciphers.get(sealed.key_id)
        if cipher is None:
            raise SecretError(
                f"a secret was sealed with the key '{sealed.key_id}', which SLUICE_SECRET_KEY "
                f"does not hold (it holds: {', '.join(self._ciphers)}); add that key after the "
                "current one, or enter the secret again"
            )
        nonce, rest = sealed.ciphertext[:_NONCE_BYTES], sealed.ciphertext[_NONCE_BYTES:]
        try:
            opened = cipher.decrypt(nonce, rest, _bytes(context))
        except (InvalidTag, ValueError):  # ValueError: shorter than a nonce
            raise SecretError(
                f"a secret does not open with the key '{sealed.key_id}': it was sealed with "
                "another key of that id, for another purpose, or was altered; enter it again"
            ) from None
        return opened.decode("utf-8", "surrogatepass")

    def holds(self, key_id: str) -> bool:
        """Whether a key of this id is there."""
        return key_id in self._ciphers

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._ciphers)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeySecret:
    """A new api key. ``value`` is shown once; ``hash`` and ``masked`` are what is stored."""

    value: str = field(repr=False)
    hash: bytes = field(repr=False)
    masked: str


def mint_api_key() -> ApiKeySecret:
    """A new random api key: ``slk_`` and 43 characters that carry 32 random bytes."""
    value = _API_KEY_PREFIX + secrets.token_urlsafe(32)
    return ApiKeySecret(value=value, hash=hash_api_key(value), masked=mask(value))


def hash_api_key(value: str) -> bytes:
    """SHA-256 of an api key, by which it is looked up. Takes any text that a client may send."""
    return hashlib.sha256(_bytes(value)).digest()


def mask(value: str) -> str:
    """The first 8 and last 4 characters, enough to recognise a key; of a short one, nothing."""
    return f"{value[:8]}…{value[-4:]}" if len(value) >= _MASK_FROM else "…"


def load_or_create_key_file(path: str | Path) -> str:
    """The setting for a `Keyring` from a file, which is created with a new key if absent.

    Created with mode 0600 and complete from its first moment: of several processes that start at
    once, one creates it and all return the same key. Raises `SecretError` when others may read
    the file or when it does not hold a key.
    """
    file = Path(path)
    try:
        if not file.exists():
            _create(file)
        return _read(file)
    except OSError as error:
        raise SecretError(f"the key file {file} cannot be used: {error.strerror}") from error


def _create(file: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as writing:
            _ = writing.write(Keyring.generate() + "\n")
            writing.flush()
            os.fsync(writing.fileno())
        try:
            # A link, not a rename: it fails where another process was first, instead of
            # replacing the key that process has begun to use.
            os.link(draft, file)
        except FileExistsError:
            return
        _sync_directory(file.parent)
    finally:
        draft.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a new name durable: a key lost in a power cut would take every secret with it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: Path) -> str:
    with file.open("rb") as reading:
        mode = stat.S_IMODE(os.fstat(reading.fileno()).st_mode)
        if mode & 0o077:
            raise SecretError(
                f"others may use the key file {file} (its mode is {mode:04o}); run: chmod 600 {file}"
            )
        setting = reading.read().decode("utf-8", "replace").strip()
    try:
        _ = Keyring(setting)
    except SecretError as error:
        raise SecretError(
            f"the key file {file} does not hold a key; restore it from a backup. Without it, "
            f"secrets that were sealed before do not open ({error})"
        ) from None
    return setting


def _parse(entry: str, number: int) -> tuple[str, bytes]:
    """One ``id:key`` or bare key. Errors name its position only: the entry is the secret."""
    key_id, colon, encoded = entry.rpartition(":")
    if colon and not _KEY_ID.fullmatch(key_id):
        raise SecretError(f"entry {number} has an id of other than A-Z a-z 0-9 _ . -: {_FORM}")
    if not _BASE64URL.fullmatch(encoded):
        raise SecretError(f"entry {number} is not a key: {_FORM}")
    bare = encoded.rstrip("=")
    try:
        key = base64.urlsafe_b64decode(bare + "=" * (-len(bare) % 4))
    except binascii.Error:
        key = b""
    if len(key) != _KEY_BYTES:
        raise SecretError(f"entry {number} is not a key of 32 bytes: {_FORM}")
    return key_id or hashlib.sha256(key).hexdigest()[:8], key


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
