"""A finished adapter on its way out: the manifest with links, and the archive that streams."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from graft_api.jobs.schemas import AdapterBody, AdapterFile
from graft_api.settings import ApiSettings
from graft_api.streams import chunks_of
from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest, sha256_of
from graft_shared.buckets import Bucket
from graft_shared.errors import AdapterNotReady, ArtifactCorrupt, ObjectNotFound
from graft_shared.jobs import Job, StoredObject


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """The manifest of a job's adapter, read and proven, and where everything lies."""

    prefix: str
    manifest: AdapterManifest
    manifest_object: StoredObject

    def objects(self) -> list[tuple[str, StoredObject]]:
        """Name and object of every file, the manifest last."""
        files = [
            (file.name, StoredObject(key=self.prefix + file.name, size=file.size, sha256=file.sha256))
            for file in self.manifest.files
        ]
        return [*files, (MANIFEST_NAME, self.manifest_object)]


def read_adapter(job: Job, bucket: Bucket) -> StoredAdapter:
    """Read the manifest that the job points at.

    Raises:
        AdapterNotReady: The job has not succeeded.
        ArtifactCorrupt: The manifest is gone, or another one than was proven.
    """
    if job.adapter is None:
        raise AdapterNotReady(job_id=job.id, status=job.status.value)
    stored = StoredObject(**job.adapter["manifest"])
    with _open(bucket, stored) as source:
        content = source.read(stored.size + 1)
    if sha256_of(content) != stored.sha256:
        raise ArtifactCorrupt(key=stored.key, expected=stored.sha256, found=sha256_of(content))
    manifest = AdapterManifest.model_validate_json(content)
    return StoredAdapter(prefix=job.adapter["prefix"], manifest=manifest, manifest_object=stored)


def adapter_body(adapter: StoredAdapter, bucket: Bucket, settings: ApiSettings, base_url: str) -> AdapterBody:
    """The manifest with a link per file; `base_url` is the address that the user reached the API at."""
    manifest = adapter.manifest
    return AdapterBody(
        job_id=manifest.job_id,
        epoch=manifest.epoch,
        base_model=manifest.base_model,
        base_revision=manifest.base_revision,
        files=linked_files(adapter, bucket, settings, base_url),
        links_expire_at=int(time.time() + settings.link_seconds),
        archive=f"/jobs/{manifest.job_id}/adapter/archive",
        proof=manifest.proof,
        versions=manifest.versions,
    )


def linked_files(adapter: StoredAdapter, bucket: Bucket, settings: ApiSettings, base_url: str) -> list[AdapterFile]:
    """Every file that the manifest names, each with a link."""
    return [
        AdapterFile(
            **file.model_dump(),
            url=bucket.presign(adapter.prefix + file.name, expires=settings.link_life, base_url=base_url),
        )
        for file in adapter.manifest.files
    ]


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An uncompressed tar of an adapter, made while it is read: no file is held in memory.

    Args:
        folder: The one folder that everything unpacks into.
        mtime: The time that the files get, Unix seconds.
    """

    adapter: StoredAdapter
    bucket: Bucket
    folder: str
    mtime: int

    def check(self) -> None:
        """Look at every object before the first byte leaves: after it, only a broken connection can tell of an error.

        Raises:
            ArtifactCorrupt: An object is gone or has another size than was proven.
        """
        for _, stored in self.adapter.objects():
            with _open(self.bucket, stored):
                size = self.bucket.size(stored.key)
            if size != stored.size:
                raise ArtifactCorrupt(key=stored.key, expected=stored.sha256, found=f"{size} bytes")

    @property
    def size(self) -> int:
        """The archive's length in bytes."""
        files = self.adapter.objects()
        return sum(len(self._header(name, stored)) + _padded(stored.size) for name, stored in files) + len(_END)

    def chunks(self) -> Iterator[bytes]:
        """The archive, piece by piece.

        Raises:
            ArtifactCorrupt: An object's bytes are not those that were proven; the archive stays incomplete.
        """
        for name, stored in self.adapter.objects():
            yield self._header(name, stored)
            yield from _proven(self.bucket, stored)
            yield bytes(_padded(stored.size) - stored.size)
        yield _END

    def _header(self, name: str, stored: StoredObject) -> bytes:
        member = tarfile.TarInfo(f"{self.folder}/{name}")
        member.size, member.mtime, member.mode = stored.size, self.mtime, 0o644
        return member.tobuf(format=tarfile.GNU_FORMAT)


_END = bytes(2 * tarfile.BLOCKSIZE)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _proven(bucket: Bucket, stored: StoredObject) -> Iterator[bytes]:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks_of(_open(bucket, stored)):
        digest.update(chunk)
        size += len(chunk)
        if size > stored.size:
            break
        yield chunk
    if size != stored.size or digest.hexdigest() != stored.sha256:
        raise ArtifactCorrupt(key=stored.key, expected=stored.sha256, found=digest.hexdigest())


def _open(bucket: Bucket, stored: StoredObject) -> BinaryIO:
    """Open what must be there: a proven object that is gone is the service's fault, not a wrong address."""
    try:
        return bucket.open(stored.key)
    except ObjectNotFound as error:
        raise ArtifactCorrupt(key=stored.key, expected=stored.sha256, found="nothing") from error
