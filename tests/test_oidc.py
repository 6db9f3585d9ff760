"""Tokens of users against a real issuer on loopback: which are good, and who cannot tell."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app import settings
from app.errors import IssuerUnavailableError, SettingsError, UnauthenticatedError
from app.oidc import Issuer
from tests.issuer import AUDIENCE, EC_KEY, ED_KEY, RSA_KEYS, FakeIssuer, fake_issuer, published


@pytest.fixture
def fake() -> Iterator[FakeIssuer]:
    with fake_issuer() as made:
        yield made


def issuer_of(fake: FakeIssuer, **more: Any) -> Issuer:  # noqa: ANN401 - passes through
    options: dict[str, Any] = {"leeway_s": 5, "timeout_s": 2.0, "keys_s": 3600.0, "refetch_s": 0.0}
    return Issuer(fake.url, audience=AUDIENCE, **options | more)


@pytest.fixture
async def issuer(fake: FakeIssuer) -> AsyncIterator[Issuer]:
    made = issuer_of(fake)
    yield made
    await made.close()


async def test_a_good_token_tells_who_it_is(fake: FakeIssuer, issuer: Issuer) -> None:
    said = await issuer.verify(
        fake.token(
            "alice",
            name="Alice A\0",
            given_name="Alice",
            preferred_username="al",
            email="a@example.org",
            email_verified=True,
            picture=7,
        )
    )
    assert (said.issuer, said.subject) == (fake.url, "alice")
    assert (said.name, said.first_name, said.last_name) == ("Alice A", "Alice", None)
    assert (said.username, said.email, said.email_verified) == ("al", "a@example.org", True)
    assert said.picture_url is None


async def test_keys_are_fetched_once(fake: FakeIssuer, issuer: Issuer) -> None:
    for sub in ("a", "b", "c"):
        assert (await issuer.verify(fake.token(sub))).subject == sub
    assert fake.asked == ["/realm/.well-known/openid-configuration", "/realm/keys"]
    await asyncio.gather(*(issuer.verify(fake.token()) for _ in range(20)))
    assert len(fake.asked) == 2


async def test_every_asymmetric_algorithm_serves(fake: FakeIssuer, issuer: Issuer) -> None:
    fake.keys = [
        published(RSA_KEYS[0], "one"),
        published(EC_KEY, "ec"),
        published(ED_KEY, "ed", alg="EdDSA"),
    ]
    assert await issuer.verify(fake.token(alg="PS256"))
    assert await issuer.verify(fake.token(alg="RS512"))
    assert await issuer.verify(fake.token(alg="ES256", key=EC_KEY, kid="ec"))
    assert await issuer.verify(fake.token(alg="EdDSA", key=ED_KEY, kid="ed"))
    assert await issuer.verify(fake.token(aud=["other", AUDIENCE]))


async def test_a_token_without_a_key_id_is_tried_with_every_key_that_fits(
    fake: FakeIssuer, issuer: Issuer
) -> None:
    fake.keys = [published(EC_KEY, "x"), published(RSA_KEYS[1], "y"), published(RSA_KEYS[0], None)]
    assert await issuer.verify(fake.token(kid=None))


def unsigned(fake: FakeIssuer, algorithm: str) -> str:
    """Header and claims with an empty signature, which no library would write."""
    parts = fake.token().split(".")
    header = json.dumps({"alg": algorithm, "kid": "one", "typ": "JWT"}).encode()
    return ".".join([base64.urlsafe_b64encode(header).decode().rstrip("="), parts[1], ""])


def public_pem() -> bytes:
    return (
        RSA_KEYS[0]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def signed_with_the_public_key(fake: FakeIssuer) -> str:
    """The confusion of algorithms: an HMAC whose secret is what everybody knows."""
    _, claims, _ = fake.token().split(".")
    header = json.dumps({"alg": "HS256", "kid": "one", "typ": "JWT"}).encode()
    text = base64.urlsafe_b64encode(header).decode().rstrip("=") + "." + claims
    made = hmac.new(public_pem(), text.encode(), hashlib.sha256).digest()
    return text + "." + base64.urlsafe_b64encode(made).decode().rstrip("=")


async def test_forged_and_stale_tokens_are_refused_alike(fake: FakeIssuer, issuer: Issuer) -> None:
    fake.keys += ["no key at all"]  # pyright: ignore[reportAttributeAccessIssue] - strangers send anything
    fake.keys += [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "shared", "use": "sig"},
        published(RSA_KEYS[0], "for-encryption", use="enc"),
        published(RSA_KEYS[0], "only-ps", alg="PS256"),
        {"kty": "RSA", "kid": "broken", "n": "AQ"},
    ]
    other = ec.generate_private_key(ec.SECP384R1())
    now = int(time.time())
    good = fake.token()
    head, body, signature = good.split(".")
    tokens = {
        "no token": "a.b.c",
        "not ASCII": "é.é.é",
        "huge": "a" * 20_000 + "." + body + "." + signature,
        "other key": fake.token(key=RSA_KEYS[1]),
        "unknown key id": fake.token(kid="unheard-of"),
        "alg none": fake.token(key=None, alg="none"),
        "alg none, signed header": unsigned(fake, "none"),
        "alg None": unsigned(fake, "None"),
        "HS256 with the public key": signed_with_the_public_key(fake),
        "HS256 with a published secret": fake.token(alg="HS256", key="secret" * 8, kid="shared"),
        "another curve": fake.token(alg="ES384", key=other, kid="one"),
        "key for encryption": fake.token(kid="for-encryption"),
        "key for another algorithm": fake.token(kid="only-ps"),
        "broken key": fake.token(kid="broken"),
        "other issuer": fake.token(iss="https://elsewhere.example"),
        "issuer with a slash more": fake.token(iss=fake.url + "/"),
        "no issuer": fake.token(without=("iss",)),
        "other audience": fake.token(aud="somebody-else"),
        "no audience": fake.token(without=("aud",)),
        "expired": fake.token(exp=now - 60),
        "never expires": fake.token(without=("exp",)),
        "not yet valid": fake.token(nbf=now + 60),
        "issued tomorrow": fake.token(iat=now + 86_400),
        "nobody's": fake.token(without=("sub",)),
        "empty subject": fake.token(""),
        "subject that Postgres cannot keep": fake.token("a\0b"),
        "critical extension": fake.token(header={"crit": ["exp"], "exp": 1}),
        "altered": ".".join([head, body[:-4] + "AAAA", signature]),
        "cut off": ".".join([head, body, signature[:-6]]),
    }
    said: set[str] = set()
    for name, token in tokens.items():
        with pytest.raises(UnauthenticatedError) as refusal:
            await issuer.verify(token)
        assert refusal.value.status == 401, name
        said.add(str(refusal.value))
    assert len(said) == 1, "a refusal tells which check failed"


async def test_clocks_may_differ_a_little(fake: FakeIssuer, issuer: Issuer) -> None:
    now = int(time.time())
    assert await issuer.verify(fake.token(exp=now - 1, nbf=now + 3, iat=now + 3))


async def test_a_rotated_key_is_found_and_the_old_one_forgotten(
    fake: FakeIssuer, issuer: Issuer
) -> None:
    old = fake.token()
    assert await issuer.verify(old)
    fake.keys = [published(RSA_KEYS[1], "two")]
    assert await issuer.verify(fake.token(key=RSA_KEYS[1], kid="two"))
    with pytest.raises(UnauthenticatedError):
        await issuer.verify(old)


async def test_unknown_keys_do_not_make_us_ask_again_and_again(fake: FakeIssuer) -> None:
    issuer = issuer_of(fake, refetch_s=60.0)
    assert await issuer.verify(fake.token())
    for number in range(50):
        with pytest.raises(UnauthenticatedError):
            await issuer.verify(fake.token(kid=f"made-up-{number}"))
    assert len(fake.asked) == 2
    await issuer.close()


async def test_without_the_issuer_nobody_can_tell(fake: FakeIssuer, issuer: Issuer) -> None:
    fake.stop()
    for _ in range(2):
        with pytest.raises(IssuerUnavailableError) as refusal:
            await issuer.verify(fake.token())
        assert refusal.value.status == 503
    with pytest.raises(UnauthenticatedError):  # of this one everybody can
        await issuer.verify(unsigned(fake, "none"))
    fake.start()
    assert await issuer.verify(fake.token())


async def test_known_keys_serve_while_the_issuer_is_away(fake: FakeIssuer) -> None:
    issuer = issuer_of(fake, keys_s=0.0)
    assert await issuer.verify(fake.token())
    fake.stop()
    assert await issuer.verify(fake.token())
    with pytest.raises(IssuerUnavailableError):  # may be a new key of the issuer's
        await issuer.verify(fake.token(kid="two"))
    with pytest.raises(UnauthenticatedError):
        await issuer.verify(fake.token(key=RSA_KEYS[1]))
    issuer._set.fetched_at -= 25 * 3600  # pyright: ignore[reportPrivateUsage] - a day later
    with pytest.raises(IssuerUnavailableError):
        await issuer.verify(fake.token())
    fake.start()
    assert await issuer.verify(fake.token())
    await issuer.close()


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 500},
        {"status": 302, "headers": {"location": "/elsewhere"}},
        {"instead": b"<html>"},
        {"instead": b"[]"},
        {"instead": b"{}"},
        {"instead": b"[" * 100_000},
        {"instead": b'{"issuer": "' + b"x" * 300_000 + b'"}'},
        {"discovery": {"issuer": "https://elsewhere.example"}},
        {"discovery": {"jwks_uri": "file:///etc/passwd"}},
        {"discovery": {"jwks_uri": None}},
        {"discovery": {"jwks_uri": "http://127.0.0.1:9/keys"}},
    ],
    ids=range(11),
)
async def test_an_issuer_that_talks_nonsense_is_as_good_as_none(
    fake: FakeIssuer, issuer: Issuer, trouble: dict[str, Any]
) -> None:
    for name, value in trouble.items():
        setattr(fake, name, value)
    with pytest.raises(IssuerUnavailableError):
        await issuer.verify(fake.token())


async def test_an_issuer_that_hangs_is_waited_for_briefly_and_in_the_background(
    fake: FakeIssuer,
) -> None:
    issuer = issuer_of(fake, timeout_s=0.5, refetch_s=60.0)
    fake.hang.clear()
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    beating = asyncio.create_task(beat())
    begun = time.monotonic()
    ended = await asyncio.gather(
        *(issuer.verify(fake.token()) for _ in range(10)), return_exceptions=True
    )
    took = time.monotonic() - begun
    beating.cancel()
    assert all(isinstance(each, IssuerUnavailableError) for each in ended)
    assert took < 3.0, "ten callers waited one after the other"
    assert beats >= 5, "the event loop stood still"
    assert len(fake.asked) <= 1, "each of ten callers asked"
    await issuer.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"oidc_issuer": "https://id.example"}, "go together"),
        ({"oidc_audience": "a"}, "go together"),
        ({"oidc_issuer": "http://id.example", "oidc_audience": "a"}, "must be an https address"),
        ({"oidc_issuer": "id.example", "oidc_audience": "a"}, "must be an https address"),
        ({"oidc_issuer": "https://u@id.example", "oidc_audience": "a"}, "without user"),
        ({"oidc_issuer": "https://id.example?x=1", "oidc_audience": "a"}, "without user"),
    ],
)
def test_settings_that_would_let_anybody_in_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings.load(given)
