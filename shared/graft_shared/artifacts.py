"""Every path in the bucket, as a pure function; and the manifest that proves an adapter."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

MANIFEST_NAME = "manifest.json"


class FileProof(BaseModel):
    """One file of an artifact: where it lies under the artifact's prefix, how long it is and what it hashes to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    sha256: str


class AdapterManifest(BaseModel):
    """What a finished adapter consists of, and what was proven about it. Written last, never overwritten."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    job_id: str
    epoch: int
    base_model: str
    base_revision: str
    files: tuple[FileProof, ...]
    proof: dict[str, Any]
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """The canonical JSON that is stored; its sha256 stands in the job's row."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()


def file_key(tenant: str, file_id: str) -> str:
    """Where an uploaded file lies."""
    return f"tenants/{tenant}/files/{file_id}"


def upload_key(tenant: str, upload_id: str) -> str:
    """Where a file lies that came through a link, until it is checked and becomes an object of its own."""
    return f"tenants/{tenant}/uploads/{upload_id}"


def job_prefix(tenant: str, job_id: str) -> str:
    """Everything that belongs to one job."""
    return f"tenants/{tenant}/jobs/{job_id}/"


def epoch_prefix(tenant: str, job_id: str, epoch: int) -> str:
    """The only place where this epoch of the job may write."""
    return f"{job_prefix(tenant, job_id)}e{epoch}/"


def prepared_key(tenant: str, job_id: str, epoch: int, name: str) -> str:
    """Where one file of the prepared data lies."""
    return f"{epoch_prefix(tenant, job_id, epoch)}prepared/{name}"


def earlier_adapter_key(tenant: str, job_id: str, epoch: int) -> str:
    """Where a job keeps the adapter that it goes on from: one tar, made while its data is prepared."""
    return prepared_key(tenant, job_id, epoch, "adapter.tar")


def checkpoint_key(tenant: str, job_id: str, epoch: int, step: int) -> str:
    """Where the checkpoint after optimizer step `step` lies: one tar."""
    return f"{epoch_prefix(tenant, job_id, epoch)}checkpoints/step-{step}.tar"


def adapter_prefix(tenant: str, job_id: str, epoch: int) -> str:
    """The folder of the adapter that this epoch trained."""
    return f"{epoch_prefix(tenant, job_id, epoch)}adapter/"


def merged_prefix(tenant: str, job_id: str, epoch: int) -> str:
    """The folder of the merged model that this epoch made."""
    return f"{epoch_prefix(tenant, job_id, epoch)}merged/"


def log_key(tenant: str, job_id: str, epoch: int) -> str:
    """Where the trainer's log of this epoch lies."""
    return f"{epoch_prefix(tenant, job_id, epoch)}trainer.log"


@dataclass(frozen=True, kw_only=True)
class JobObject:
    """One object of a job, as its key tells: the epoch that wrote it, and what it is."""

    key: str
    epoch: int
    is_log: bool
    checkpoint_step: int | None


def read_job_key(tenant: str, job_id: str, key: str) -> JobObject | None:
    """Read a key that an epoch of this job has written; None for any other."""
    found = re.fullmatch(re.escape(job_prefix(tenant, job_id)) + r"e(\d+)/.+", key)
    if found is None:
        return None
    epoch = int(found[1])
    step = re.search(r"/checkpoints/step-(\d+)\.tar$", key)
    return JobObject(
        key=key,
        epoch=epoch,
        is_log=key == log_key(tenant, job_id, epoch),
        checkpoint_step=int(step[1]) if step is not None else None,
    )


def sha256_of(data: bytes) -> str:
    """The sha256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
