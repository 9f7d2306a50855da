"""What `graft backup` and `graft restore` refuse, and what they never leave behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graft_local.backup import CannotBackUp, back_up, bring_back
from graft_local.secrets import kept_secret
from graft_shared.buckets import read_back
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.store import Database, open_database
from graft_shared.store.migrate import check_migrations, migrate
from tests.waiting import wait_until

GRAFT = str(Path(sys.executable).parent / "graft")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Path]:
    """A state folder whose database is open, with an object and the secrets of `graft up`."""
    state = tmp_path / "state"
    opened: Database = open_database(f"sqlite:///{state / 'graft.db'}")
    migrate(opened)
    DirectoryBucket(state / "bucket").put_bytes("tenants/red/adapter", b"weights")
    kept_secret(state / "key-pepper")
    yield state
    opened.close()


def test_a_backup_brings_database_objects_and_secrets_back(service: Path, tmp_path: Path) -> None:
    stored = DirectoryBucket(service / "bucket").put_bytes("tenants/red/other", b"more weights")
    listed = back_up(service, tmp_path / "kept", {}, with_models=False)
    assert not _links(service) and stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert bring_back(tmp_path / "kept", tmp_path / "again") == listed
    restored = open_database(f"sqlite:///{tmp_path / 'again' / 'graft.db'}")
    assert check_migrations(restored)
    restored.close()
    read_back(DirectoryBucket(tmp_path / "again" / "bucket"), stored)
    pepper = tmp_path / "again" / "key-pepper"
    assert pepper.read_text() == (service / "key-pepper").read_text()
    assert stat.S_IMODE(pepper.stat().st_mode) == 0o600


def test_what_the_environment_names_is_backed_up_or_said_not_to_be(service: Path, tmp_path: Path) -> None:
    kept, again, base = tmp_path / "kept", tmp_path / "again", Path("mine", "config.json")
    (tmp_path / "bases" / base).parent.mkdir(parents=True)
    (tmp_path / "bases" / base).write_text("{}")
    own = {"GRAFT_KEY_PEPPER": "my own", "GRAFT_WEBHOOK_SECRET": "", "GRAFT_MODELS_DIR": str(tmp_path / "bases")}

    def run(*arguments: object) -> tuple[str, str]:
        command = [GRAFT, *map(str, arguments)]
        ran = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True)
        return ran.stdout, ran.stderr

    _, said = run("backup", kept, "--state-dir", service, "--with-models")
    _, said_again = run("restore", kept, "--state-dir", again)
    for each in (said, said_again):
        assert "Not in it, as the environment had them: GRAFT_KEY_PEPPER. Keep them" in each and "my own" not in each
    assert (again / "models" / base).read_text() == "{}"
    told, _ = run("backup", tmp_path / "third", "--state-dir", service, "--json")
    assert json.loads(told)["not_in_it"] == ["GRAFT_KEY_PEPPER"]


def test_what_cannot_be_backed_up_leaves_nothing_behind(service: Path, tmp_path: Path) -> None:
    elsewhere = {"GRAFT_DATABASE_URL": "postgresql+psycopg://host/graft"}
    with pytest.raises(CannotBackUp, match=r"deploy/README\.md"):
        back_up(service, tmp_path / "kept", elsewhere, with_models=False)
    with pytest.raises(CannotBackUp, match="There is no service in"):
        back_up(tmp_path / "nowhere", tmp_path / "kept", {}, with_models=False)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    with pytest.raises(CannotBackUp, match="not an empty folder"):
        back_up(service, service, {}, with_models=False)


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_what_a_database_left_behind_is_not_brought_into_another(service: Path, tmp_path: Path, suffix: str) -> None:
    kept, again = tmp_path / "kept", tmp_path / "again"
    back_up(service, kept, {}, with_models=False)
    again.mkdir()
    (again / f"graft.db{suffix}").write_bytes(b"pages of a database that was moved away")
    with pytest.raises(CannotBackUp, match=f"graft.db{suffix}"):
        bring_back(kept, again)
    assert [path.name for path in again.iterdir()] == [f"graft.db{suffix}"]


def test_a_service_is_never_restored_over_and_a_damaged_backup_restores_nothing(service: Path, tmp_path: Path) -> None:
    kept, again = tmp_path / "kept", tmp_path / "again"
    back_up(service, kept, {}, with_models=False)
    with pytest.raises(CannotBackUp, match="holds a service already"):
        bring_back(kept, service)
    with pytest.raises(CannotBackUp, match="is no backup"):
        bring_back(tmp_path, again)
    (kept / "bucket" / "objects" / "tenants" / "red" / "adapter").write_bytes(b"weight!")
    with pytest.raises(CannotBackUp, match=r"bucket/objects/tenants/red/adapter .* not what was backed up"):
        bring_back(kept, again)
    assert list(again.iterdir()) == []
    with (again / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CannotBackUp, match="Stop it first"):
            bring_back(kept, again)


def test_a_bucket_on_another_file_system_is_backed_up(service: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert Path(elsewhere).stat().st_dev != tmp_path.stat().st_dev
        shutil.move(service / "bucket", f"{elsewhere}/bucket")
        (service / "bucket").symlink_to(f"{elsewhere}/bucket")
        listed = back_up(service, tmp_path / "kept", {}, with_models=False)
        assert "bucket/objects/tenants/red/adapter" in listed["files"]
        assert not _links(service)


def test_objects_behind_a_link_are_in_the_backup(service: Path, tmp_path: Path) -> None:
    shutil.move(service / "bucket" / "objects" / "tenants", tmp_path / "larger")
    (service / "bucket" / "objects" / "tenants").symlink_to(tmp_path / "larger")
    assert "bucket/objects/tenants/red/adapter" in back_up(service, tmp_path / "kept", {}, with_models=False)["files"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda database: database.write_bytes(b"no database" * 1000), "is damaged: restore an earlier backup"),
        (lambda database: (database.unlink(), database.mkdir()), "Mend that, or run this as the user"),
    ],
)
def test_what_sqlite_refuses_is_told_with_the_remedy_for_it(
    service: Path, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    damage(service / "graft.db")
    with pytest.raises(CannotBackUp, match=told):
        back_up(service, tmp_path / "kept", {}, with_models=False)


def test_models_behind_links_are_in_the_backup_and_links_in_a_ring_end_it_not(service: Path, tmp_path: Path) -> None:
    base = tmp_path / "disk" / "tiny"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "again").symlink_to(base)
    (service / "models" / "org").mkdir(parents=True)
    for name in ("tiny", "org/same"):
        (service / "models" / name).symlink_to(base)
    listed = back_up(service, tmp_path / "kept", {}, with_models=True)
    assert [name for name in listed["files"] if name.startswith("models/")] == [
        "models/org/same/config.json",
        "models/tiny/config.json",
    ]
    assert (tmp_path / "kept" / "models" / "tiny" / "config.json").read_text() == "{}"


def test_what_the_disk_refuses_is_told_with_its_path_and_a_remedy(
    service: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotBackUp, match=r"/file: File exists\. Mend that"):
        back_up(service, tmp_path / "file" / "kept", {}, with_models=False)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotBackUp, match=r"/adapter: No space left on device\. Make room there"):
        back_up(service, tmp_path / "other", {}, with_models=False)
    assert not (tmp_path / "other").exists() and not _links(service)


def test_a_backup_that_is_told_to_end_leaves_nothing_and_the_next_removes_what_a_killed_one_left(
    service: Path, tmp_path: Path
) -> None:
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            running.append(held_up := _held_up_backup(service, tmp_path / "kept"))
            held_up.send_signal(number)
            assert held_up.wait() == 128 + number
            assert not _links(service) and sorted(path.name for path in tmp_path.iterdir()) == ["state"]
        running.append(killed := _held_up_backup(service, tmp_path / "kept"))
        killed.kill()
        killed.wait()
        left = _links(service)
        assert len(left) == 1
        running.append(alive := _held_up_backup(service, tmp_path / "other"))
        held = _links(service)
        assert len(held) == 1 and held != left
        back_up(service, tmp_path / "third", {}, with_models=False)
        assert _links(service) == held, "what a running backup holds is its own"
        alive.kill()
        alive.wait()
        back_up(service, tmp_path / "fourth", {}, with_models=False)
        assert not _links(service)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _held_up_backup(service: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A backup that has its links and the database, and waits for ever to read a secret."""
    pipe = service / "webhook-secret"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [GRAFT, "backup", str(folder), "--state-dir", str(service)],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # where tests run under nohup
    )

    def is_read() -> bool:
        try:
            os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # stays open: the end of what it reads never comes
        except OSError:
            return False
        return True

    wait_until(is_read, seconds=30, what="the backup at its secrets")
    kept_secret(service / "another")
    (service / "another").replace(pipe)
    return process


def _links(service: Path) -> list[Path]:
    return list((service / "bucket").glob(".held-by-backup-*"))
