"""What does a batch of 50,000 lines and 200 MB cost the API, and those who use it meanwhile?

Method. A fresh embedded Postgres with fsync on, one ``sluice serve``, one ``sluice worker`` and the
simulator, all on this machine; a program with OpenAI's SDK uploads the file, makes a batch of it and
polls it every 50 ms until it is accepted and until its first line is answered. Beside it two clients ask
for the list of batches and for one batch, each again 20 ms after its answer, from before the upload
until the first answer. Memory is the API process's peak (VmHWM) of its whole life, and what it was
before. Lines are chat requests of random words, each different.

    python -m bench openai_ingest [--quick] [--lines 50000] [--line-bytes 4100]
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from app import api_keys
from bench._rig import Rig

_TEXTS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
_PROBE_S = 0.02
_ALONE_S = 5.0
_POLL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lines", type=int)
    parser.add_argument("--line-bytes", type=int, default=4100)
    parser.add_argument("--client", nargs=3, metavar=("URL", "KEY", "FILE"), help="internal")
    given = parser.parse_args()
    if given.client is not None:
        print(json.dumps(_use(*given.client)))
        return
    lines = given.lines or (2000 if given.quick else 50_000)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        size = _write(home / "in.jsonl", lines, given.line_bytes)
        print(f"{lines:,} lines, {size / 1e6:.0f} MB")
        asyncio.run(_measure(home))


def _write(file: Path, lines: int, line_bytes: int) -> int:
    chance = random.Random(1)  # noqa: S311 - filler
    # English of our own documents, shuffled: made-up words would cost a tokenizer several times as much.
    words = " ".join(f.read_text(encoding="utf-8") for f in _TEXTS).split()
    with file.open("w", encoding="ascii") as writing:
        for number in range(lines):
            text = " ".join(chance.choices(words, k=line_bytes // 4))[: line_bytes - 140]
            asked = {
                "custom_id": f"row-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "small", "messages": [{"role": "user", "content": text}]},
            }
            writing.write(json.dumps(asked) + "\n")
    return file.stat().st_size


def _use(url: str, key: str, file: str) -> dict[str, float]:
    """What a program does, and when what was so, in seconds."""
    begun = time.monotonic()
    client = openai.OpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        http_client=openai.DefaultHttpxClient(trust_env=False),
        timeout=600,
    )
    stored = client.files.create(file=Path(file), purpose="batch")
    told = {"uploaded": time.monotonic() - begun}
    batch = client.batches.create(
        input_file_id=stored.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    told["created"] = time.monotonic() - begun
    while batch.status == "validating":
        time.sleep(_POLL_S)
        batch = client.batches.retrieve(batch.id)
    if batch.status != "in_progress":
        raise RuntimeError(f"the batch is {batch.status}: {batch.errors}")
    told["accepted"] = time.monotonic() - begun
    while batch.output_file_id is None:
        time.sleep(_POLL_S)
        batch = client.batches.retrieve(batch.id)
    told["answered"] = time.monotonic() - begun
    client.batches.cancel(batch.id)
    return told


async def _measure(home: Path) -> None:
    async with Rig.open(
        home,
        simulate={"latency_ms": 200},
        variables={"SLUICE_PORT": "0"},
        worker_log=home / "log",
    ) as rig:
        await rig.create_resource("small")
        async with rig.db.transaction() as conn:
            _, key = await api_keys.create(conn, name="bench", **rig.ids)
        await rig.start_workers(1)
        api, url = rig.start_api()
        before = _memory(api)
        seen: list[float] = []
        async with httpx.AsyncClient(
            base_url=url, headers={"x-api-key": key}, trust_env=False, timeout=60
        ) as http:
            warm = await rig.submit(
                await rig.create_resource("other"),
                [b'{"messages":[{"role":"user","content":"warm"}]}'],
            )
            scope = f"{rig.ids['workspace_id']}/{rig.ids['environment_id']}"
            paths = [
                "/v1/batches?limit=1",
                f"/v1/completion-batch/{scope}/{warm.batch_id}?includesItems=false",
            ]
            for path in paths * 10:
                (await http.get(path)).raise_for_status()
            alone: list[float] = []
            for taken, seconds in ((alone, _ALONE_S), (seen, None)):
                probing = [asyncio.create_task(_probe(http, path, taken)) for path in paths]
                if seconds is not None:
                    await asyncio.sleep(seconds)
                    for task in probing:
                        task.cancel()
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.openai_ingest"),
                *("--client", url, key, str(home / "in.jsonl")),
                stdout=subprocess.PIPE,
            )
            said, _ = await client.communicate()
            for task in probing:
                task.cancel()
        told: dict[str, Any] = json.loads(said)
        after = _memory(api)
    print(f"uploaded after   {told['uploaded']:.1f} s")
    print(f"accepted after   {told['accepted']:.1f} s")
    print(f"first answer     {told['answered']:.1f} s")
    print(f"API memory       {after:.0f} MB at its peak, {before:.0f} MB before")
    print(f"interactive      {_spread(seen)}; before the upload {_spread(alone)}")


def _spread(seen: list[float]) -> str:
    ordered = sorted(each * 1000 for each in seen)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {p50:.1f}, p99 {p99:.1f}, most {ordered[-1]:.0f} ms of {len(ordered):,}"


async def _probe(http: httpx.AsyncClient, path: str, seen: list[float]) -> None:
    while True:
        begun = time.perf_counter()
        (await http.get(path)).raise_for_status()
        seen.append(time.perf_counter() - begun)
        await asyncio.sleep(_PROBE_S)


def _memory(process: subprocess.Popen[bytes]) -> float:
    """The most that a process had in memory so far, in megabytes."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
