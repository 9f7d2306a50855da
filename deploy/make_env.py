"""`python deploy/make_env.py`: write .env for docker-compose.yml: fresh secrets, this host's name and its GPUs."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY", "WEBHOOK_SECRET", "KEY_PEPPER")
MOST_GPUS = 8  # docker-compose.yml has a worker for each of so many cards
CLASS_TOLERANCE = 0.93  # as in graft_shared.capacity: how much less than its class a card may have
SMI = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
SMI_SECONDS = 30  # a driver in trouble lets it hang


@dataclass(frozen=True)
class Gpu:
    """A card as the driver tells of it; without memory where it does not say."""

    index: int
    name: str
    memory_gib: float | None


def env_text(example: str, profiles: str, host_name: str) -> str:
    """The example with its secrets, this host's name and its workers filled in."""
    values = {name: secrets.token_hex(24) for name in SECRETS}
    values |= {"API_KEYS": f"default={secrets.token_hex(24)}", "COMPOSE_PROFILES": profiles, "HOST_NAME": host_name}
    for name, value in values.items():
        example, found = re.subn(rf"^{name}=.*$", f"{name}={value}", example, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"the example has {found} lines for {name}")
    return example


def worker_name(host_name: str) -> str:
    """A host's name as a worker's name may have it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", host_name)[:80] or "host"


def gpus_of(listing: str) -> list[Gpu]:
    """Read what nvidia-smi lists."""
    rows = [re.fullmatch(r"(\d+), (.*), (.*)", line.strip()) for line in listing.splitlines()]
    return [
        Gpu(int(row[1]), row[2], int(row[3]) / 1024 if row[3].isdigit() else None) for row in rows if row is not None
    ]


def smallest_gib(capacity: str) -> float | None:
    """The memory of the smallest GPU class of a capacity table; None for a table without GPUs. Reads no other YAML."""
    lines = [line for text in capacity.splitlines() if (line := text.partition("#")[0].rstrip())]
    begun = [line for line in lines[lines.index("classes:") + 1 :] if line.startswith(" ")]
    indent = len(begun[0]) - len(begun[0].lstrip())
    entries = re.split(rf"^ {{{indent}}}(?=\S)", "\n".join(begun), flags=re.MULTILINE)
    gpu_entries = [entry for entry in entries if not re.search(r"\bcpu: *true\b", entry)]
    found = [memory for entry in gpu_entries if (memory := re.search(r"\bmemory_gib: *([\d.]+)", entry))]
    return min((float(memory[1]) for memory in found), default=None)


def choose_profiles(gpus: Sequence[Gpu], smallest: float | None) -> tuple[str, list[str]]:
    """The compose profiles of this host, and why, in sentences."""
    taken, reasons = [], []
    for gpu in gpus:
        size = "an unknown amount of memory" if gpu.memory_gib is None else f"{gpu.memory_gib:.1f} GiB"
        if gpu.index >= MOST_GPUS:
            reasons.append(
                f"GPU {gpu.index} ({gpu.name}) has no worker: docker-compose.yml ends with GPU {MOST_GPUS - 1}"
            )
        elif smallest is None:
            reasons.append(f"GPU {gpu.index} ({gpu.name}) has no worker: deploy/capacity.yaml has no class for GPUs")
        elif gpu.memory_gib is None or gpu.memory_gib < CLASS_TOLERANCE * smallest:
            limit = f"the smallest class of deploy/capacity.yaml has {smallest} GiB"
            reasons.append(f"GPU {gpu.index} ({gpu.name}) has no worker: it has {size}, and {limit}")
        else:
            taken.append(f"gpu{gpu.index}")
            reasons.append(f"GPU {gpu.index} ({gpu.name}, {size}) has a worker")
    if not taken:
        reasons.append("a worker trains on the CPU, which is for tiny bases alone")
    return ",".join(taken) or "cpu", reasons


def _list_gpus() -> tuple[str, str]:
    """What nvidia-smi lists, and what is to be said of it."""
    if shutil.which(SMI[0]) is None:
        return "", "nvidia-smi is not installed: no GPU was looked for"
    try:
        listed = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer within {SMI_SECONDS} s: no GPU is used"
    if listed.returncode != 0:
        return "", f"nvidia-smi failed, so no GPU is used: {(listed.stderr or listed.stdout).strip()}"
    return listed.stdout, f"nvidia-smi lists {len(gpus_of(listed.stdout))} GPUs"


def main() -> None:
    """Write .env, readable by its owner alone; one that exists is left as it is."""
    try:
        fd = os.open(ROOT / ".env", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    listing, said = _list_gpus()
    profiles, reasons = choose_profiles(gpus_of(listing), smallest_gib((ROOT / "deploy" / "capacity.yaml").read_text()))
    host_name = worker_name(socket.gethostname())
    with os.fdopen(fd, "w") as file:
        file.write(env_text((ROOT / "deploy" / "env.example").read_text(), profiles, host_name))
    lines = [said, *reasons, f"wrote .env: COMPOSE_PROFILES={profiles}, HOST_NAME={host_name}, and fresh secrets"]
    sys.stdout.write("\n".join([*lines, "the API key is in its line API_KEYS", ""]))


if __name__ == "__main__":
    main()
