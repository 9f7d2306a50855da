"""A directory that serves as bucket: temp file, fsync, rename; links are signed by HMAC and served by the API."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlencode

from graft_shared.buckets.base import CHUNK_BYTES, UploadLink
from graft_shared.errors import BucketUnavailable, ObjectNotFound
from graft_shared.jobs import StoredObject

LINK_PATH = "/objects/"  # the API serves signed links below this path


class DirectoryBucket:
    """Objects as files under one root."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Copy a file in; atomic and durable."""
        with path.open("rb") as source:
            return self._put(key, iter(lambda: source.read(CHUNK_BYTES), b""))

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        """Write some bytes; atomic and durable."""
        return self._put(key, iter([data]))

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading."""
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFound(key=key) from error

    def size(self, key: str) -> int:
        """The size of an object in bytes."""
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ObjectNotFound(key=key) from error

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that begin with `prefix`, in order."""
        objects = self._root / "objects"
        parents = prefix.split("/")[:-1]
        if any(part in ("", ".", "..") for part in parents):
            return
        with _translated():
            paths = [path for path in objects.joinpath(*parents).rglob("*") if path.is_file()]
        yield from sorted(key for path in paths if (key := path.relative_to(objects).as_posix()).startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove an object; its folder stays, for somebody may be about to write there."""
        with _translated():
            self._path(key).unlink(missing_ok=True)

    def remove_unfinished(self, *, older_than: timedelta) -> int:
        """Remove files that were being written when their writer died."""
        began_before, removed = time.time() - older_than.total_seconds(), 0
        with _translated():
            for partial in (self._root / "staging").glob("*"):
                with suppress(FileNotFoundError):  # another sweeper's, or finished in this moment
                    if partial.stat().st_mtime < began_before:
                        partial.unlink()
                        removed += 1
        return removed

    def presign(self, key: str, *, expires: timedelta, base_url: str) -> str:
        """A link to the API that carries its own permission."""
        until = int(time.time() + expires.total_seconds())
        return _link(key, base_url, expires=until, signature=self._sign(until, key))

    def is_signed(self, key: str, expires: int, signature: str) -> bool:
        """Tell whether a link was signed by this bucket and still holds."""
        return time.time() < expires and hmac.compare_digest(self._sign(expires, key), signature)

    def presign_upload(self, object: StoredObject, *, expires: timedelta, base_url: str) -> UploadLink:
        """A link to the API, signed for these bytes."""
        until = int(time.time() + expires.total_seconds())
        signature = self._sign("put", until, object.size, object.sha256, object.key)
        facts = {"bytes": object.size, "sha256": object.sha256}
        url = _link(object.key, base_url, expires=until, signature=signature, **facts)
        return UploadLink(url=url, headers={"content-length": str(object.size)})

    def may_write(self, object: StoredObject, expires: int, signature: str) -> bool:
        """Tell whether a link to write this object was signed by this bucket and still holds."""
        signed = self._sign("put", expires, object.size, object.sha256, object.key)
        return time.time() < expires and hmac.compare_digest(signed, signature)

    def ping(self) -> None:
        """Make the root if it is missing."""
        with _translated():
            (self._root / "objects").mkdir(parents=True, exist_ok=True)

    def uri(self, key: str) -> str:
        """The file's own address."""
        return self._path(key).as_uri()

    def _put(self, key: str, chunks: Iterator[bytes]) -> StoredObject:
        path = self._path(key)
        digest, size = hashlib.sha256(), 0
        with _translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = self._root / "staging"
            staging.mkdir(exist_ok=True)
            partial = staging / secrets.token_hex(16)
            try:
                with partial.open("xb") as sink:
                    for chunk in chunks:
                        digest.update(chunk)
                        size += len(chunk)
                        sink.write(chunk)
                    sink.flush()
                    os.fsync(sink.fileno())
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
            _sync_folder(path.parent)
        return StoredObject(key=key, size=size, sha256=digest.hexdigest())

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not key or any(part in ("", ".", "..") for part in parts):
            raise ObjectNotFound(key=key)
        return self._root.joinpath("objects", *parts)

    def _sign(self, *facts: object) -> str:
        """Sign what a link allows; its first word, a moment or `put`, keeps links to read and to write apart."""
        return hmac.new(self._secret(), "\n".join(map(str, facts)).encode(), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        """The key of this bucket's links, made once, readable by the owner alone."""
        path = self._root / "link-secret"
        if not path.exists():
            self._root.mkdir(parents=True, exist_ok=True)
            mine = self._root / f"link-secret-{secrets.token_hex(8)}"
            mine.touch(mode=0o600)
            mine.write_bytes(secrets.token_bytes(32))
            try:
                os.link(mine, path)  # the first of several processes wins
            except FileExistsError:
                pass
            finally:
                mine.unlink()
        return path.read_bytes()


def _link(key: str, base_url: str, **query: object) -> str:
    return f"{base_url.rstrip('/')}{LINK_PATH}{quote(key)}?{urlencode(query)}"


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise BucketUnavailable(reason=error.strerror or str(error)) from error
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
