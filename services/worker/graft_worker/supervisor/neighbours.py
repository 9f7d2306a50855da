"""All that a supervisor works with, chosen in one place and handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graft_shared.buckets import Bucket
from graft_shared.capacity import CapacityTable
from graft_shared.dispatch import Doorbell
from graft_shared.store import Database, Files, Leases, Reports
from graft_worker.device import Device
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.audience import Invite, nobody
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.spare import SpareTrainer


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The store, the bucket, the bell, the base models, and this worker's own device, place and settings."""

    settings: WorkerSettings
    database: Database
    leases: Leases
    files: Files
    reports: Reports
    bucket: Bucket
    doorbell: Doorbell
    base_models: BaseModels
    device: Device
    spare: SpareTrainer
    capacity: CapacityTable
    place: str  # where this worker lives: see `graft_worker.place`
    open_dataset_bucket: Callable[[str], Bucket]
    draining: Callable[[], bool]
    invite: Invite = nobody
