"""Checkpoints on their way: a folder as one tar in the bucket, and back. Plain files only."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from graft_shared.buckets import Bucket, fetch
from graft_shared.errors import ArtifactCorrupt
from graft_shared.jobs import StoredObject


def store_folder(bucket: Bucket, key: str, folder: Path) -> StoredObject:
    """Upload the files of one flat folder as a tar; the same files give the same bytes."""
    packed = folder.with_suffix(".tar")
    with tarfile.open(packed, "w", format=tarfile.GNU_FORMAT) as tar:
        for file in sorted(folder.iterdir()):
            info = tarfile.TarInfo(file.name)
            info.size = file.stat().st_size
            with file.open("rb") as content:
                tar.addfile(info, content)
    try:
        return bucket.put_file(key, packed)
    finally:
        packed.unlink()


def fetch_folder(bucket: Bucket, object: StoredObject, folder: Path) -> None:
    """Download a tar that `store_folder` made, prove its bytes, and unpack it.

    Raises:
        ObjectNotFound: There is no such object.
        ArtifactCorrupt: Its bytes are not those that were stored.
    """
    packed = folder.with_suffix(".tar")
    fetch(bucket, object, packed)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(packed, "r") as tar:
        for member in tar:
            # Not `extractall(filter=…)`, which came with Python 3.11.4: Debian's 3.11 does not have it.
            content = tar.extractfile(member) if member.isreg() and Path(member.name).name == member.name else None
            if content is None:
                raise ArtifactCorrupt(key=object.key, expected="plain files", found=member.name)
            with content, (folder / member.name).open("wb") as out:
                shutil.copyfileobj(content, out)
    packed.unlink()
