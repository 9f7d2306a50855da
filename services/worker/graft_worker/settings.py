"""Settings of a worker: the shared ones, its device, and where it works."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from graft_shared.jobs import Stage
from graft_shared.settings import SharedSettings


class WorkerSettings(SharedSettings):
    """One worker drives one device and does one stage on it, so that a bell it hears is a bell it can answer."""

    worker_name: str = Field(default_factory=socket.gethostname, pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Unique among the workers of a fleet, or the later one does not start; and the same after a restart."""
    worker_device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda:\d+)$")
    """`auto` takes the first GPU, else the CPU."""
    worker_stage: Stage = Stage.TRAIN
    """`train`; `prepare`: rows to tokens, which needs neither a GPU nor torch; or `merge`: adapters into their bases on
    the CPU, which needs as much of the host's memory as the base in full precision."""

    spare_trainer: Annotated[bool | None, BeforeValidator(lambda value: None if value == "" else value)] = None
    """Keep a trainer ready that has done its imports; by default where there is a GPU. It takes half a GB of memory."""

    look_seconds: float = Field(default=10.0, gt=0)
    """An idle worker looks for work this often without a bell, so that a dead broker costs latency, not progress."""
    orders_seconds: float = Field(default=1.0, gt=0)
    """How often a running job is asked whether it is to be cancelled or paused."""
    stop_grace_seconds: float = Field(default=30.0, gt=0)
    """How long a trainer may take to save a checkpoint and leave, before it is killed."""
    upload_patience_seconds: float = Field(default=300.0, gt=0)
    """How long a bucket or database that is away is waited for, before a finished run counts as failed."""

    cache_max_bytes: int = Field(default=200 * 1024**3, ge=0)
    """How much of base models and data this host keeps between jobs, for all its workers together."""

    @property
    def work_dir(self) -> Path:
        """Where running jobs have their folders."""
        return (self.state_dir / "work").absolute()

    @property
    def spare_dir(self) -> Path:
        """The home of this worker's spare trainer; on the file system of `work_dir`, whither its log moves."""
        return self.work_dir / self.worker_name / "spare"

    @property
    def cache_dir(self) -> Path:
        """Where base models and compiled kernels are kept between jobs."""
        return (self.state_dir / "cache").absolute()

    @property
    def lock_dir(self) -> Path:
        """Where the slots' locks lie."""
        return (self.state_dir / "locks").absolute()
