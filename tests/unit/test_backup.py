"""What `graft backup` and `graft restore` refuse, and what they never leave behind."""

from __future__ import annotations

import fcntl
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft_local.backup import CannotBackUp, back_up, bring_back
from graft_local.secrets import kept_secret
from graft_shared.buckets import read_back
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.store import Database, open_database
from graft_shared.store.migrate import check_migrations, migrate


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
    assert not list(service.glob("backup-*")) and stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert bring_back(tmp_path / "kept", tmp_path / "again") == listed
    restored = open_database(f"sqlite:///{tmp_path / 'again' / 'graft.db'}")
    assert check_migrations(restored)
    restored.close()
    read_back(DirectoryBucket(tmp_path / "again" / "bucket"), stored)
    pepper = tmp_path / "again" / "key-pepper"
    assert pepper.read_text() == (service / "key-pepper").read_text()
    assert stat.S_IMODE(pepper.stat().st_mode) == 0o600


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
