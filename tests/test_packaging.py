"""The wheel works where the checkout is not: it is built, installed elsewhere, and used there."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Echo(BaseHTTPRequestHandler):
    """A provider that answers with the prompt, upside down in its case."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": asked["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {
                            "role": "assistant",
                            "content": asked["messages"][-1]["content"].swapcase(),
                        },
                    }
                ],
                "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's name
        """Quiet: pytest shows what matters."""


@pytest.fixture
def provider() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel; its dependencies are this environment's.

    They come through a .pth file. The .pth files in that folder are not read, so the editable
    installation of the checkout stays out of sight.
    """
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    binaries = home / "bin"
    python = str(binaries / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = sysconfig.get_paths()
    (home / "lib" / version / "site-packages" / "dependencies.pth").write_text(
        "\n".join(dict.fromkeys([ours["purelib"], ours["platlib"]])) + "\n", encoding="utf-8"
    )
    return binaries


def environment(**more: str) -> dict[str, str]:
    """This process's environment without anything that could lead back to the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "PYTHON"))}
    return kept | more


def test_wheel_carries_sql_and_migrations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"app/{file.relative_to(ROOT).as_posix()}"
        for folder in ("sql", "migrations")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".sql", ".py", ".mako"}
    }
    assert "app/sql/schema.sql" in expected
    assert expected <= names


def test_wheel_carries_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"app"}


def test_wheel_knows_its_schema_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    said = subprocess.run(
        [
            installed / "python",
            "-c",
            "import app.migrate; print(app.__file__); print(app.migrate.head())",
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert Path(said[0]).is_relative_to(installed.parent)
    newest = max(file.stem for file in (ROOT / "migrations" / "versions").glob("*.sql"))
    assert newest.startswith(f"{said[1]}_")


def test_installed_wheel_answers_a_file(installed: Path, provider: str, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "q.csv").write_text('text\nfirst\n"second, with a comma"\n', encoding="utf-8")
    command = ["run", "q.csv", "--prompt", "Answer: {text}", "--base-url", provider]
    ran = subprocess.run(
        [installed / "sluice", *command, "--model", "m", "--output", "out.csv"],
        cwd=here,
        env=environment(SLUICE_HOME=str(tmp_path / "home")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    with (here / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["first", "second, with a comma"]
    assert "aNSWER: FIRST" in rows[0].values()
    assert "aNSWER: SECOND, WITH A COMMA" in rows[1].values()
