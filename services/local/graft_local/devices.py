"""Which GPUs this machine lets us drive, by the driver's own numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

SMI_SECONDS = 30.0  # many cards without persistence mode take ten
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
    listing = ask_driver("-L")
    gpus = parse_listing(listing.stdout) if listing.returncode == 0 else ()
    return visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))


def ask_driver(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What nvidia-smi says; one that hangs, as on a card that is lost, has failed."""
    command = ["nvidia-smi", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: inside the driver no signal reaches it
        return subprocess.CompletedProcess(command, -9, "", f"it does not answer within {SMI_SECONDS:g} s")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


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
