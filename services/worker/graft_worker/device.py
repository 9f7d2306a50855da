"""Which device a worker drives, and what it may therefore take from the queue. Asks the driver, never torch."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass

from graft_shared.capacity import CapacityTable
from graft_shared.jobs import Stage

_MIB = 1024**2


class NoSuchDevice(Exception):
    """The configured device is not on this machine, or cannot do what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU or the CPU, and its place in the capacity table."""

    kind: str  # "cuda" or "cpu"
    index: int
    name: str
    gpu_class: str
    takes_classes: tuple[str, ...]  # its own class first, then smaller ones, the largest first
    stage: Stage

    @property
    def visible_devices(self) -> str:
        """The value of CUDA_VISIBLE_DEVICES for a child that may use this device alone."""
        return str(self.index) if self.kind == "cuda" else ""


def find_device(wanted: str, stage: Stage, table: CapacityTable) -> Device:
    """Return the device that the settings name; preparing and merging are always done on the CPU.

    Raises:
        NoSuchDevice: There is no such GPU, it is smaller than every class of the table, or torch is not installed.
    """
    if stage is Stage.PREPARE:
        return _cpu(stage, table)
    if importlib.util.find_spec("torch") is None:
        needs = "Merging" if stage is Stage.MERGE else "Training"
        raise NoSuchDevice(f"{needs} needs torch: install graft-worker[train], or set GRAFT_WORKER_STAGE=prepare.")
    if stage is Stage.MERGE:
        return _cpu(stage, table)
    gpus = _gpus()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return _cpu(stage, table)
    index = 0 if wanted == "auto" else int(wanted.removeprefix("cuda:"))
    if index >= len(gpus):
        raise NoSuchDevice(f"GRAFT_WORKER_DEVICE is {wanted}, but nvidia-smi lists {len(gpus)} GPUs.")
    name, memory_bytes = gpus[index]
    gpu_class = table.class_for_memory(memory_bytes)
    if gpu_class is None:
        raise NoSuchDevice(
            f"{wanted} ({name}) has {memory_bytes / 1024**3:.1f} GiB: below every class of the capacity table."
        )
    smaller = [other for other in table.classes if other.memory_bytes < gpu_class.memory_bytes and not other.is_cpu]
    smaller.sort(key=lambda other: other.memory_bytes, reverse=True)
    cpu = [other.name for other in table.classes if other.is_cpu]
    return Device(
        kind="cuda",
        index=index,
        name=name,
        gpu_class=gpu_class.name,
        takes_classes=(gpu_class.name, *(other.name for other in smaller), *cpu),
        stage=stage,
    )


def _cpu(stage: Stage, table: CapacityTable) -> Device:
    classes = tuple(gpu_class.name for gpu_class in table.classes if gpu_class.is_cpu)
    if stage is Stage.TRAIN and not classes:
        raise NoSuchDevice("The capacity table has no class for CPUs: set GRAFT_WORKER_DEVICE to a GPU.")
    gpu_class = classes[0] if classes else "cpu"
    return Device(kind="cpu", index=0, name="CPU", gpu_class=gpu_class, takes_classes=classes, stage=stage)


def _gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of every GPU, by the driver's index."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    rows = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if line.strip()]
    return [(name.strip(), int(memory) * _MIB) for name, memory in rows]
