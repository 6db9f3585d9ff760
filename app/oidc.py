"""Tokens of users: are they the issuer's, for us, and of this hour?

The issuer (OpenID Connect) publishes its public keys. They are fetched when the first token comes,
kept for a while, and fetched anew when a token names a key that is not among them, at most every
ten seconds, whatever tokens come. While the issuer does not answer, the keys that were fetched
serve on for a day; without any, tokens are neither good nor bad, which is a 503, not a 401.

Signatures of asymmetric algorithms only: with ``HS256`` anybody could sign with a public key.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httpx
import jwt

from app.access import Claims
from app.errors import IssuerUnavailableError, UnauthenticatedError
from app.log import Log

log = Log("oidc")

#: By the type of key that verifies it: a token cannot choose another's algorithm.
_ALGORITHMS: Final[Mapping[str, frozenset[str]]] = {
    "RSA": frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    "EC": frozenset({"ES256", "ES384", "ES512"}),
    "OKP": frozenset({"EdDSA"}),
}
_ALLOWED: Final = frozenset[str]().union(*_ALGORITHMS.values())
_CURVES: Final = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519"}

_MOST_TOKEN: Final = 16 * 1024
_MOST_BYTES: Final = 256 * 1024  # of a discovery document, and of a key set
_MOST_KEYS: Final = 100
_MOST_TEXT: Final = 500
_OK: Final = 200
_STALE_S: Final = 24 * 3600.0

Json = dict[str, Any]


class _FetchError(Exception):
    """The issuer's keys could not be had; the text says why."""


@dataclass(slots=True, kw_only=True)
class _KeySet:
    keys: list[Json] = field(default_factory=list[Json])
    fetched_at: float = float("-inf")
    tried_at: float = float("-inf")
    failed: bool = False


class Issuer:
    """Verifies the tokens of one issuer for one audience. One per process."""

    def __init__(
        self,
        url: str,
        *,
        audience: str,
        leeway_s: int,
        timeout_s: float,
        keys_s: float,
        refetch_s: float = 10.0,
    ) -> None:
        self.url = url
        self._audience = audience
        self._leeway_s = leeway_s
        self._timeout_s = timeout_s
        self._keys_s = keys_s
        self._refetch_s = refetch_s
        self._set = _KeySet()
        self._fetching = asyncio.Lock()
        self._http: httpx.AsyncClient | None = None

    async def verify(self, token: str) -> Claims:
        """What a good token says of its user.

        Raises UnauthenticatedError for any other, IssuerUnavailableError when nobody can tell.
        """
        try:
            if len(token) > _MOST_TOKEN:
                raise jwt.InvalidTokenError
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            if algorithm not in _ALLOWED:
                raise jwt.InvalidTokenError
            candidates = await self._candidates(str(algorithm), header.get("kid"))
            return self._claims(self._verified(token, str(algorithm), candidates))
        except (jwt.PyJWTError, ValueError, RecursionError):
            # All look the same: which check failed is of use to forgers only.
            raise UnauthenticatedError(
                "This token is not valid here: it is not signed by the configured issuer for this"
                " audience, or it has expired. Sign in again."
            ) from None

    async def close(self) -> None:
        """Let go of connections."""
        if self._http is not None:
            await self._http.aclose()

    # Which keys -----------------------------------------------------------------------------------

    async def _candidates(self, algorithm: str, kid: object) -> list[Json]:
        """The issuer's keys that may have signed. Fetches them when there is reason to."""
        found = self._fitting(algorithm, kid)
        age = time.monotonic() - self._set.fetched_at
        if not found or age > self._keys_s:
            await self._refresh()
            found = self._fitting(algorithm, kid)
            age = time.monotonic() - self._set.fetched_at
        if self._set.failed and (not found or age > _STALE_S):
            raise IssuerUnavailableError(
                "The issuer of tokens does not answer, so this one cannot be checked. Repeat the"
                " request in a moment, or use an API key.",
                code="ISSUER_UNAVAILABLE",
            )
        return found

    def _fitting(self, algorithm: str, kid: object) -> list[Json]:
        return [
            key
            for key in self._set.keys
            if algorithm in _ALGORITHMS.get(key.get("kty", ""), ())
            and key.get("alg") in (None, algorithm)
            and key.get("use") in (None, "sig")
            and (algorithm not in _CURVES or key.get("crv") == _CURVES[algorithm])
            and (kid is None or key.get("kid") == kid)
        ]

    async def _refresh(self) -> None:
        """Fetch the keys, one fetch at a time, and not again within ``refetch_s`` of the last."""
        async with self._fetching:
            now = time.monotonic()
            if now - self._set.tried_at < self._refetch_s:
                return
            try:
                async with asyncio.timeout(self._timeout_s):
                    keys = await self._fetched()
            except (_FetchError, httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
                self._set.tried_at, self._set.failed = now, True
                log.warning("issuer.silent", issuer=self.url, error=_reason(error))
                return
            if self._set.failed:
                log.info("issuer.found", issuer=self.url)
            self._set = _KeySet(keys=keys, fetched_at=now, tried_at=now)

    async def _fetched(self) -> list[Json]:
        if self._http is None:
            # In a thread: reading the authorities' certificates takes tens of milliseconds.
            self._http = await asyncio.to_thread(
                httpx.AsyncClient, trust_env=False, follow_redirects=False, timeout=self._timeout_s
            )
        about = await self._get(f"{self.url.rstrip('/')}/.well-known/openid-configuration")
        if about.get("issuer") != self.url:
            raise _FetchError("its discovery document names another issuer")
        address = about.get("jwks_uri")
        here, there = urlsplit(self.url).scheme, urlsplit(str(address)).scheme
        if not isinstance(address, str) or there not in {here, "https"}:
            raise _FetchError("its discovery document names no key set, or one in the clear")
        keys = (await self._get(address)).get("keys")
        if not isinstance(keys, list):
            raise _FetchError("its key set has no keys")
        listed = cast("list[object]", keys)[:_MOST_KEYS]
        return [cast("Json", key) for key in listed if isinstance(key, dict)]

    async def _get(self, url: str) -> Json:
        assert self._http is not None
        body = b""
        # As it is: what is small on its way must not unfold in our memory.
        async with self._http.stream("GET", url, headers={"accept-encoding": "identity"}) as reply:
            if reply.status_code != _OK:
                raise _FetchError(f"HTTP status {reply.status_code}")
            async for piece in reply.aiter_raw():
                body += piece
                if len(body) > _MOST_BYTES:
                    raise _FetchError(f"it sent more than {_MOST_BYTES:,} bytes")
        try:
            told: object = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise _FetchError("it sent no JSON object")
        return cast("Json", told)

    # Whether it is good ---------------------------------------------------------------------------

    def _verified(self, token: str, algorithm: str, candidates: list[Json]) -> Json:
        for key in candidates:
            try:
                return jwt.decode(
                    token,
                    jwt.PyJWK(key, algorithm),
                    algorithms=[algorithm],
                    audience=self._audience,
                    issuer=self.url,
                    leeway=self._leeway_s,
                    options={"require": ["exp", "iss", "aud", "sub"]},
                )
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError, jwt.PyJWKError):
                continue  # without a kid several keys may fit
        raise jwt.InvalidSignatureError

    def _claims(self, said: Json) -> Claims:
        subject = said["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= _MOST_TEXT or "\0" in subject:
            raise jwt.InvalidTokenError
        verified = said.get("email_verified")
        return Claims(
            issuer=self.url,
            subject=subject,
            name=_text(said, "name"),
            first_name=_text(said, "given_name"),
            last_name=_text(said, "family_name"),
            username=_text(said, "preferred_username"),
            email=_text(said, "email"),
            email_verified=verified if isinstance(verified, bool) else None,
            picture_url=_text(said, "picture"),
        )


def _text(said: Json, name: str) -> str | None:
    """A claim that Postgres can keep; what is for people may be cut."""
    value = said.get(name)
    if not isinstance(value, str) or not value:
        return None
    return value.encode("utf-8", "replace").decode().replace("\0", "")[:_MOST_TEXT] or None


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, _FetchError) else type(error).__name__
