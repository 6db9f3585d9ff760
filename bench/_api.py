"""The API as a process, and a plain client of it that adds next to nothing to what is measured."""

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

from app import api_keys
from bench._rig import START_S, Rig


@dataclass(slots=True, kw_only=True)
class Api:
    """A running ``sluice serve``, one connection to it, and the tenant's part of its addresses."""

    process: subprocess.Popen[bytes]
    client: http.client.HTTPConnection
    base: str
    key: str

    def get(self, path: str) -> tuple[float, bytes]:
        """Milliseconds until the answer was read, and its body."""
        begun = time.perf_counter()
        self.client.request("GET", self.base + path, headers={"authorization": self.key})
        reply = self.client.getresponse()
        body = reply.read()
        took = (time.perf_counter() - begun) * 1000
        assert reply.status == 200, body[:300]
        return took, body

    def post(self, path: str, pieces: Iterable[bytes], length: int) -> tuple[float, bytes]:
        """Seconds until the answer was read, and its body; the request is sent piece by piece."""
        headers = {
            "authorization": self.key,
            "content-type": "application/json",
            "content-length": str(length),
        }
        begun = time.perf_counter()
        self.client.request("POST", self.base + path, body=iter(pieces), headers=headers)
        reply = self.client.getresponse()
        body = reply.read()
        assert reply.status == 201, body[:300]
        return time.perf_counter() - begun, body


@contextmanager
def serving(rig: Rig, key: str) -> Generator[Api]:
    """Start it on a free port and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    with (rig.home / "api.log").open("ab") as log:
        process = subprocess.Popen(command, env=rig.environment, stdout=log, stderr=log)
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    api = Api(
        process=process,
        client=client,
        base=f"/v1/completion-batch/{rig.ids['workspace_id']}/{rig.ids['environment_id']}",
        key=f"Bearer {key}",
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                api.get("?limit=1")
                break
            except OSError:
                client.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the API did not start") from None
                time.sleep(0.1)
        yield api
    finally:
        client.close()
        process.terminate()
        process.wait(60)


async def key_of(rig: Rig) -> str:
    """A key that may do what the part does."""
    async with rig.db.transaction() as conn:
        _, value = await api_keys.create(conn, name="bench", **rig.ids)
    return value
