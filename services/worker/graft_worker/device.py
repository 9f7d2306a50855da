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
    """The configured device is not on this machine."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU or the CPU, and its place in the capacity table."""

    kind: str  # "cuda" or "cpu"
    index: int
    name: str
    gpu_class: str
    takes_classes: tuple[str, ...]  # its own class first, then smaller ones, the largest first
    stages: tuple[Stage, ...]

    @property
    def visible_devices(self) -> str:
        """The value of CUDA_VISIBLE_DEVICES for a child that may use this device alone."""
        return str(self.index) if self.kind == "cuda" else ""


def find_device(wanted: str, table: CapacityTable) -> Device:
    """Return the device that the settings name.

    Raises:
        NoSuchDevice: There is no such GPU, or it is smaller than every class of the table.
    """
    gpus = _gpus()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return _cpu(table)
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
        stages=(Stage.TRAIN,),
    )


def _cpu(table: CapacityTable) -> Device:
    classes = tuple(gpu_class.name for gpu_class in table.classes if gpu_class.is_cpu)
    trains = bool(classes) and importlib.util.find_spec("torch") is not None
    return Device(
        kind="cpu",
        index=0,
        name="CPU",
        gpu_class="cpu",
        takes_classes=classes,
        stages=(Stage.PREPARE, Stage.TRAIN) if trains else (Stage.PREPARE,),
    )


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
