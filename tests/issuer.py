"""An issuer of tokens over HTTP on loopback: keys that rotate, and everything that can go wrong."""

import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "sluice"

Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

#: Made once: they are the slow part.
RSA_KEYS = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def published(key: Private, kid: str | None, **more: object) -> dict[str, Any]:
    """The public half as a key set has it."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        told = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        told = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        told = OKPAlgorithm.to_jwk(public, as_dict=True)
    return told | {"use": "sig"} | ({} if kid is None else {"kid": kid}) | more


class FakeIssuer:
    """Serves a discovery document and a key set; ``instead`` answers with something else."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [published(RSA_KEYS[0], "one")]
        self.asked: list[str] = []
        self.instead: bytes | None = None
        self.status = 200
        self.headers: dict[str, str] = {}
        self.discovery: dict[str, Any] = {}
        self.hang = threading.Event()
        self.hang.set()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/realm"

    def start(self) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                issuer.hang.wait(20)
                body = issuer.instead if issuer.instead is not None else issuer.answer(self.path)
                self.send_response(issuer.status)
                for name, value in issuer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - theirs
                del format, args

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away is no error."""
                del request, client_address

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> bytes:
        if path.endswith("openid-configuration"):
            told = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"} | self.discovery
        else:
            told = {"keys": self.keys}
        return json.dumps(told).encode()

    def token(
        self,
        sub: str = "alice",
        *,
        key: Private | str | bytes | None = RSA_KEYS[0],
        kid: str | None = "one",
        alg: str = "RS256",
        header: dict[str, Any] | None = None,
        without: tuple[str, ...] = (),
        **claims: object,
    ) -> str:
        now = int(time.time())
        said: dict[str, Any] = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": sub,
            "iat": now,
            "exp": now + 300,
        } | claims
        for name in without:
            del said[name]
        given = ({} if kid is None else {"kid": kid}) | (header or {})
        return jwt.encode(said, key, algorithm=alg, headers=given)  # pyright: ignore[reportArgumentType] - None for alg none


@contextmanager
def fake_issuer() -> Generator[FakeIssuer]:
    made = FakeIssuer()
    try:
        yield made
    finally:
        made.hang.set()
        made.stop()
