"""The contract of a bucket: whole objects by key, proven by size and sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Protocol

from graft_shared.errors import ArtifactCorrupt
from graft_shared.jobs import StoredObject

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class UploadLink:
    """Where to PUT an object, and the headers that belong to it."""

    url: str
    headers: dict[str, str]


class Bucket(Protocol):
    """A place for whole objects. Raises BucketUnavailable when it does not answer."""

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Store a file's bytes under `key`, durable on return; the same key again replaces the object whole."""

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        """Store a few bytes under `key`, durable on return."""

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading; raises ObjectNotFound."""

    def size(self, key: str) -> int:
        """The size of an object in bytes; raises ObjectNotFound."""

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that begin with `prefix`, in order."""

    def delete(self, key: str) -> None:
        """Remove an object; harmless when there is none."""

    def remove_unfinished(self, *, older_than: timedelta) -> int:
        """Remove what writers that died left of objects that never came to be; returns of how many.

        Args:
            older_than: Since their writing began; whoever writes for longer is taken for dead.
        """

    def presign(self, key: str, *, expires: timedelta, base_url: str) -> str:
        """A link by which anyone can read this one object for a while.

        Args:
            base_url: The address that the user reached the API at; a bucket without an endpoint of its own links there.
        """

    def presign_upload(self, object: StoredObject, *, expires: timedelta, base_url: str) -> UploadLink:
        """A link by which anyone can write this one object for a while: these bytes and no others.

        A store that does not look at the headers may take others all the same: what came has to be read and compared.
        """

    def ping(self) -> None:
        """Raise BucketUnavailable unless the bucket answers; creates it when it is missing."""

    def uri(self, key: str) -> str:
        """The object's address for people and logs: `s3://…` or `file://…`."""


def hash_file(path: Path) -> tuple[int, str]:
    """Return (size in bytes, sha256 in hex) of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def fetch(bucket: Bucket, object: StoredObject, path: Path) -> None:
    """Download an object and prove that it is the one that was stored.

    Raises:
        ObjectNotFound: There is no such object.
        ArtifactCorrupt: Its bytes are not those that were stored; nothing is left at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    with bucket.open(object.key) as source, partial.open("wb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != object.sha256:
        partial.unlink()
        raise ArtifactCorrupt(key=object.key, expected=object.sha256, found=digest.hexdigest())
    partial.rename(path)


def read_back(bucket: Bucket, object: StoredObject) -> None:
    """Read a stored object and compare it with what was meant.

    Raises:
        ArtifactCorrupt: Size or sha256 differ.
    """
    digest = hashlib.sha256()
    with bucket.open(object.key) as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != object.sha256:
        raise ArtifactCorrupt(key=object.key, expected=object.sha256, found=digest.hexdigest())
