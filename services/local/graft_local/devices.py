"""Which GPUs this machine lets us drive, by the driver's own numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_GPU_LINE = re.compile(r"^GPU (?P<index>\d+): (?P<name>.+) \(UUID: (?P<uuid>[^)]+)\)$")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card, under the number that nvidia-smi gives it."""

    index: int
    name: str
    uuid: str


def gpus_here(environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The cards that CUDA_VISIBLE_DEVICES leaves us; none where there is no driver."""
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return ()
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    gpus = parse_listing(listing.stdout) if listing.returncode == 0 else ()
    return visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))


def parse_listing(text: str) -> tuple[Gpu, ...]:
    """Read what `nvidia-smi -L` prints; lines about MIG slices are passed over."""
    found = (_GPU_LINE.match(line.strip()) for line in text.splitlines())
    return tuple(Gpu(index=int(hit["index"]), name=hit["name"], uuid=hit["uuid"]) for hit in found if hit)


def visible(gpus: tuple[Gpu, ...], wanted: str | None) -> tuple[Gpu, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: numbers or the beginnings of UUIDs, up to the first that is unknown."""
    if wanted is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in wanted.split(","):
        match = [gpu for gpu in gpus if _is_meant(gpu, entry.strip())]
        if len(match) != 1:
            break
        chosen += match
    return tuple(chosen)


def _is_meant(gpu: Gpu, entry: str) -> bool:
    return gpu.index == int(entry) if entry.isdigit() else bool(entry) and gpu.uuid.startswith(entry)
