"""What a host keeps between jobs, for all its workers: objects by their sha256, and the hub's base models.

Eviction is by last use. An object that goes away while a run works with it does no harm (the run has a link of its
own); a base model that a run works with is locked by it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graft_shared.buckets import Bucket, fetch, hash_file
from graft_shared.jobs import StoredObject
from graft_shared.logs import log_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HostCache:
    """One folder that the workers of a host share, and how large it may grow."""

    folder: Path
    max_bytes: int

    @property
    def hub_dir(self) -> Path:
        """The cache folder that `huggingface_hub` is given."""
        return self.folder / "hub"

    def fetch(self, bucket: Bucket, object: StoredObject, path: Path) -> None:
        """Put an object's bytes at `path`, proven by their sha256, from here if another job has fetched them before.

        Raises:
            ObjectNotFound: There is no such object.
            ArtifactCorrupt: The bucket's bytes are not those that were stored.
        """
        kept = self._objects / object.sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._holds(object, kept) and _linked(kept, path):
            return
        fetch(bucket, object, path)
        self._objects.mkdir(parents=True, exist_ok=True)
        new = kept.with_name(f"{kept.name}.{os.getpid()}")
        if _linked(path, new):
            new.replace(kept)
        self.make_room()

    @contextmanager
    def borrowed(self, base_model: str) -> Iterator[None]:
        """Keep a hub base from being evicted while the block runs; it counts as used now."""
        lock = self._lock_of(_repo_folder(base_model))
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(lock)
            yield

    def make_room(self) -> None:
        """Evict what was not used for the longest time, until everything fits; what is in use stays."""
        entries = sorted([*self._kept_objects(), *self._kept_bases()])
        excess = sum(size for _, _, size in entries) - self.max_bytes
        for _, path, size in entries:
            if excess <= 0:
                return
            if self._evicted(path):
                excess -= size
                log_event(logger, "cache_entry_evicted", entry=path.name, bytes=size)

    @property
    def _objects(self) -> Path:
        return self.folder / "objects"

    def _lock_of(self, repo_folder: str) -> Path:
        return self.folder / "in-use" / f"{repo_folder}.lock"

    def _holds(self, object: StoredObject, kept: Path) -> bool:
        """Whether the kept bytes are right; a disk may lie, so they are hashed again."""
        try:
            if hash_file(kept) == (object.size, object.sha256):
                os.utime(kept)
                return True
            kept.unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        return False

    def _kept_objects(self) -> Iterator[tuple[float, Path, int]]:
        for path in _children(self._objects):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield stat.st_mtime, path, stat.st_size

    def _kept_bases(self) -> Iterator[tuple[float, Path, int]]:
        for path in _children(self.hub_dir):
            if path.name.startswith("models--"):
                lock = self._lock_of(path.name)
                used_at = lock.stat().st_mtime if lock.exists() else path.stat().st_mtime
                yield used_at, path, _bytes_under(path)

    def _evicted(self, path: Path) -> bool:
        if path.parent == self._objects:
            path.unlink(missing_ok=True)
            return True
        lock = self._lock_of(path.name)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            shutil.rmtree(path, ignore_errors=True)
            return True


def _repo_folder(base_model: str) -> str:
    """The name that `huggingface_hub` gives a repository's folder."""
    return f"models--{base_model.replace('/', '--')}"


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _bytes_under(folder: Path) -> int:
    """The size of the files themselves: snapshots are links to them."""
    files = (path for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
    return sum(path.stat().st_size for path in files)


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name, in place of what an earlier try left; a copy elsewhere. False when it is gone."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
    return True
