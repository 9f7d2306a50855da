"""What a host keeps between jobs, for all its workers: objects by their sha256, base models, their 4-bit weights.

Eviction is by last use. An object that goes away while a run works with it does no harm (the run has a link of its
own); a base model that a run works with is locked by it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISLNK
from uuid import uuid4

from graft_shared.buckets import Bucket, fetch, hash_file
from graft_shared.jobs import StoredObject
from graft_shared.logs import log_event
from graft_worker.supervisor.locks import locked, locked_if_free

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
        self._keep(path, kept)
        self.make_room()

    @contextmanager
    def borrowed(self, base_model: str) -> Iterator[None]:
        """Keep a hub base from being evicted while the block runs; it counts as used now."""
        with self._used(_repo_folder(base_model)):
            yield

    @contextmanager
    def quantised(self, revision: str) -> Iterator[Path]:
        """A folder for the 4-bit weights of one revision of a base, which stays while the block runs."""
        folder = self._quantised / revision
        with self._used(revision):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        self.make_room()  # what the block made counts from now on

    def make_room(self) -> None:
        """Evict what was not used for the longest time, until everything fits; what is in use stays.

        Best effort: what another worker takes away meanwhile is no matter, and what stands in the way is logged.
        """
        try:
            self._evict_down_to(self.max_bytes)
        except OSError as error:
            log_event(logger, "cache_not_tidied", level=logging.WARNING, reason=str(error))

    @contextmanager
    def _used(self, name: str) -> Iterator[None]:
        lock = self._lock_of(name)
        with locked(lock, shared=True):
            os.utime(lock)
            yield

    @property
    def _quantised(self) -> Path:
        return self.folder / "quantised"

    @property
    def _objects(self) -> Path:
        return self.folder / "objects"

    def _lock_of(self, name: str) -> Path:
        return self.folder / "in-use" / f"{name}.lock"

    def _keep(self, path: Path, kept: Path) -> None:
        """Keep what was fetched; a cache that cannot take it costs the next job time, and this one nothing."""
        new = kept.with_name(f"{kept.name}.{uuid4().hex}")  # containers number their processes alike
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            if _linked(path, new):
                new.replace(kept)
        except OSError as error:
            log_event(logger, "object_not_kept", level=logging.WARNING, entry=kept.name, reason=str(error))
        finally:
            new.unlink(missing_ok=True)  # also after `replace`, which leaves a second name of the same file alone

    def _evict_down_to(self, max_bytes: int) -> None:
        entries = sorted([*self._kept_objects(), *self._kept_bases()])
        excess = sum(size for _, _, size in entries) - max_bytes
        for _, path, size in entries:
            if excess <= 0:
                return
            if self._evicted(path):
                excess -= size
                log_event(logger, "cache_entry_evicted", entry=path.name, bytes=size)

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
        repositories = (path for path in _children(self.hub_dir) if path.name.startswith("models--"))
        for path in (*repositories, *_children(self._quantised)):
            with contextlib.suppress(FileNotFoundError):
                yield self._used_at(path), path, _bytes_under(path)

    def _used_at(self, folder: Path) -> float:
        try:
            return self._lock_of(folder.name).stat().st_mtime
        except FileNotFoundError:
            return folder.stat().st_mtime

    def _evicted(self, path: Path) -> bool:
        try:
            if path.parent == self._objects:
                path.unlink(missing_ok=True)
                return True
            with locked_if_free(self._lock_of(path.name)) as is_free:
                if is_free:
                    shutil.rmtree(path)
                return is_free
        except OSError as error:
            log_event(logger, "cache_entry_not_evicted", level=logging.WARNING, entry=path.name, reason=str(error))
            return False


def _repo_folder(base_model: str) -> str:
    """The name that `huggingface_hub` gives a repository's folder."""
    return f"models--{base_model.replace('/', '--')}"


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _bytes_under(folder: Path) -> int:
    """The size of the files themselves: snapshots are links to them. What goes away meanwhile counts nothing."""
    return sum(_bytes_of(Path(parent, name)) for parent, _, names in os.walk(folder) for name in names)


def _bytes_of(path: Path) -> int:
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return 0
    return 0 if S_ISLNK(stat.st_mode) else stat.st_size


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name, in place of what an earlier try left; a copy elsewhere. False when it is gone."""
    target.unlink(missing_ok=True)
    try:
        _link_or_copy(source, target)
    except FileNotFoundError:
        return False
    return True


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
